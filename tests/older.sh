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
run() {
    if cargo nextest --version >/dev/null 2>&1; then
        cargo nextest run --no-fail-fast "$@"
    else
        cargo test --no-fail-fast "$@"
    fi
}
run --package volume --test gc --test gc_live -- what_two_nodes_had what_a_guest_writes_over
run --package datapath --test path -- hosts:: import:: a_mirror_is_told what_a_guest_writes_is_thrown_away
run --package fake-xapi --test migration -- the_worked_example_migrates_by_the_flow_base
