#!/bin/sh
# Checks what the plugins are built of with cargo-deny: licences, sources and duplicates, and known vulnerabilities.
#
#   packaging/audit.sh
#
# deny.toml says what is allowed. Advisories come from a database that is fetched; where that cannot be had, this says
# that they were not checked, and goes on with an older copy if there is one.
set -eu
cd "$(dirname -- "$0")/.."
PATH=$PATH:$HOME/.cargo/bin

say() { printf 'audit: %s\n' "$*" >&2; }

if ! cargo deny --version >/dev/null 2>&1; then
    say "cargo-deny is missing: cargo install --locked cargo-deny"
    exit 1
fi
for manifest in Cargo.toml tests/fuzz/Cargo.toml; do
    [ -f "$manifest" ] || continue
    say "licences, sources and duplicates of $manifest"
    cargo deny --manifest-path "$manifest" check licenses bans sources
done
if cargo deny fetch db >/dev/null 2>&1; then
    cargo deny check advisories
elif [ -n "$(ls -d "${CARGO_HOME:-$HOME/.cargo}"/advisory-dbs/*/crates 2>/dev/null)" ]; then
    say "the database of advisories cannot be fetched from here: an older copy of it is used"
    cargo deny --offline check advisories
else
    say "ADVISORIES WERE NOT CHECKED: their database cannot be fetched from here"
fi
packaging/licenses.py --check
