#!/bin/sh
# Runs a part of the suites with QEMU 7.2, the oldest that a distribution still has, beside the installed one: calls,
# imports, what is thrown away, nodes merged at rest and under a guest, and a migration.
#
#   tests/older.sh
#
# packaging/dependencies.sh fetches it from Debian's archive and installs nothing. Where it cannot be had this says so, and
# fails only with OLDER_QEMU=required.
set -eu
cd "$(dirname -- "$0")/.."
PATH=$PATH:$HOME/.cargo/bin

untested() {
    echo "older: ########## NOT TESTED WITH QEMU 7.2: $* ##########" >&2
    [ "${OLDER_QEMU-}" != required ]
    exit
}

programs=$(packaging/dependencies.sh older) || untested "it cannot be had here"
version=$("$programs/qemu-storage-daemon" --version 2>&1 | head -n 1) || untested "it cannot run here: $version"
echo "older: $version"
export TESTED_QEMU="$programs"
# Of all packages together, as the suites are built, so that nothing is compiled anew.
set -- --workspace --no-fail-fast --test gc --test gc_live --test path --test migration -- \
    what_two_nodes_had what_a_guest_writes_over \
    hosts:: import:: a_mirror_is_told what_a_guest_writes_is_thrown_away \
    the_worked_example_migrates_by_the_flow_base
if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run "$@"
else
    cargo test "$@"
fi
