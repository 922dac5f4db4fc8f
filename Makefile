# What can be done here: `make help`.

SHELL := /bin/sh
export PATH := $(PATH):$(HOME)/.cargo/bin
CARGO ?= cargo
DESTDIR ?=
PREFIX ?= /usr
SOAK_MINUTES ?= 30
# Most tests wait for processes as long as they compute.
TEST_THREADS ?= $(shell echo $$(($$(nproc) * 2)))
# Packages are for hosts with any C library, so theirs is linked in. Naming the target keeps that away from build scripts.
TARGET ?= $(shell rustc -vV | sed -n 's/^host: //p')
STATIC = target/package/$(TARGET)/release

.DEFAULT_GOAL := help
.PHONY: help demo test sweep soak bench audit check suites dependencies-demo dependencies-test build static rpm deb
.PHONY: packages install uninstall clean

help: ## Say what can be made
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/make \1\t\2/p' Makefile | expand -t 20

# The dev profile: a demo that starts sooner matters more than one that runs faster.
demo: dependencies-demo ## Migrate a running VM's disk with its snapshots, and check every byte (DEMO="--flow base")
	$(CARGO) build --workspace
	target/debug/fake-xapi demo $(DEMO)

test: dependencies-test check suites ## Run every check and every test
	@echo "make test: all passed"

check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --document-private-items

# The suites run the executables from the target directory, so these are built first.
suites:
	$(CARGO) build --workspace
	if $(CARGO) nextest --version >/dev/null 2>&1; then \
		$(CARGO) nextest run --workspace --no-fail-fast --test-threads $(TEST_THREADS); \
	else \
		$(CARGO) test --workspace --no-fail-fast --lib --bins --tests; \
	fi
	$(CARGO) test --workspace --doc
	tests/older.sh

# What takes too long for each change: every single call, 216 plans, and as many that were never tried before.
sweep: dependencies-test ## Make every single script call of a migration fail, and migrate 432 random trees (long)
	$(CARGO) build --workspace
	FAKE_XAPI_SWEEP=all $(CARGO) test --package fake-xapi --test failures --test smapiv1
	$(CARGO) test --package volume --test gc --test gc_live -- --ignored
	$(MAKE) static
	FAKE_XAPI_BUILD="$(abspath $(STATIC))" $(CARGO) test --package fake-xapi --test packages -- --include-ignored
	FAKE_XAPI_PLANS=9 $(CARGO) test --package fake-xapi --test migration --test smapiv1 random
	seed=$$(date +%s); echo "FAKE_XAPI_SEED=$$seed"; FAKE_XAPI_SEED=$$seed FAKE_XAPI_PLANS=9 \
		$(CARGO) test --package fake-xapi --test migration --test smapiv1 random
	seed=$$(date +%s); echo "FAKE_XAPI_SEED=$$seed"; FAKE_XAPI_SEED=$$seed FAKE_XAPI_STEPS=40 \
		$(CARGO) test --package fake-xapi --test steps
	FAKE_XAPI_POWER=all FAKE_XAPI_DISK=all FAKE_XAPI_MERGE=all \
		$(CARGO) test --package fake-xapi --test steps -- power broken merging
	tests/machine.sh

soak: dependencies-test ## Try what is random with new seeds for half an hour (SOAK_MINUTES), then every short history
	tests/soak.sh $(SOAK_MINUTES)

bench: dependencies-test ## Measure calls and mirrors, optimised, each against a reference (about ten minutes)
	$(CARGO) build --release --workspace
	mkdir -p target/bench
	target/release/fake-xapi bench all --json target/bench/bench.json --plot target/bench

audit: ## Check what is linked in with cargo-deny: licences, sources, duplicates, advisories
	packaging/audit.sh

dependencies-demo:
	packaging/dependencies.sh demo

dependencies-test:
	packaging/dependencies.sh test

build: ## Build the plugins as they are installed
	$(CARGO) build --release --package volume --package datapath

static:
	RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --release --package volume --package datapath \
		--target $(TARGET) --target-dir target/package

rpm: static ## Build the RPM into target/packages
	packaging/dependencies.sh packages
	BUILD=$(STATIC) packaging/package.sh rpm target/packages

deb: static ## Build the .deb into target/packages
	packaging/dependencies.sh packages
	BUILD=$(STATIC) packaging/package.sh deb target/packages

packages: rpm deb ## Build both

install: build ## Install the plugins (DESTDIR, PREFIX)
	DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" packaging/install.sh

uninstall: ## Remove the plugins (DESTDIR, PREFIX)
	DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" packaging/install.sh --uninstall

clean: ## Remove what was built
	$(CARGO) clean
