#!/bin/sh
# Fuzzes what comes in from others (the module `fuzz` of the package plugin), and keeps what it learns for the next time.
#
#   tests/fuzz/run.sh [seconds [target…]]       60 seconds for each target if not given
#
# Under libFuzzer where cargo-fuzz and a C++ compiler are there; any Rust will do, for no sanitizer is asked for. Else
# it says so, and runs the ordinary tests over many more mutations than `make test` does (FUZZ_SEED chooses which).
# What libFuzzer finds new is kept in tests/fuzz/target/grown; an input that fails in tests/fuzz/artifacts.
set -eu
cd "$(dirname -- "$0")/../.."
PATH=$PATH:$HOME/.cargo/bin
seconds=${1-60}
[ $# -eq 0 ] || shift

if ! cargo fuzz --version >/dev/null 2>&1 || ! command -v c++ >/dev/null 2>&1; then
    echo "fuzz: WITHOUT LIBFUZZER, which needs a C++ compiler and: cargo install --locked cargo-fuzz" >&2
    FUZZ_SEED=${FUZZ_SEED-$(date +%s)}
    echo "fuzz: FUZZ_SEED=$FUZZ_SEED FUZZ_ROUNDS=$((seconds * 300)) cargo test --package plugin --lib fuzz" >&2
    export FUZZ_SEED FUZZ_ROUNDS=$((seconds * 300))
    exec cargo test --quiet --package plugin --lib fuzz
fi
[ $# -gt 0 ] || set -- image record nbd_client nbd_server nbd_relay qmp request
for target in "$@"; do
    grown=tests/fuzz/target/grown/$target
    mkdir -p "$grown"
    case $target in image) longest=32768 ;; *) longest=4096 ;; esac
    echo "fuzz: $target, $seconds seconds" >&2
    if ! cargo fuzz run --fuzz-dir tests/fuzz --sanitizer none "$target" "$grown" "tests/fuzz/corpus/$target" -- \
        -max_total_time="$seconds" -max_len=$longest -timeout=10 -rss_limit_mb=1024 -verbosity=0 \
        -print_final_stats=1; then
        echo "fuzz: $target failed: its input is in tests/fuzz/artifacts/$target; try it by a copy in" \
            "tests/fuzz/corpus/$target and: cargo test --package plugin --lib fuzz" >&2
        exit 1
    fi
done
