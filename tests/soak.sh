#!/bin/sh
# Tries what is random with ever new seeds until its time is up: VMs to which everything happens at once, histories struck
# at system calls, power cuts, broken disks, migrations, mirrors of differences, promises about contents, damage, mutated
# requests, what others send. Then every history of up to three operations is struck at every system call of its last
# one, which takes about an hour on two processors. Ends at the first failure, with the command that repeats it.
#
#   tests/soak.sh [minutes]       30 if not given, of what is random
#
# SOAK_SEED=<number> begins with another seed; SOAK_STEPS=i/n strikes only the i-th of n parts of all histories, and
# SOAK_STEPS=none leaves them out.
set -eu
cd "$(dirname -- "$0")/.."
PATH=$PATH:$HOME/.cargo/bin
minutes=${1-30}
seed=${SOAK_SEED-$(date +%s)}
steps=${SOAK_STEPS-0/1}
rounds=0

# Runs one suite with a seed: the variables, then cargo's arguments.
try() {
    variables=$1
    shift
    echo "soak: $variables cargo test $*"
    # shellcheck disable=SC2086 # several variables
    if ! env $variables cargo test --quiet "$@"; then
        echo "soak: failed after $rounds rounds. Again: $variables cargo test $*" >&2
        exit 1
    fi
}

cargo build --workspace
tests/fuzz/run.sh 20
until=$(($(date +%s) + minutes * 60))
echo "soak: $minutes minutes from seed $seed on"
while [ "$(date +%s)" -lt "$until" ]; do
    try "FAKE_XAPI_SEED=$seed FAKE_XAPI_SOAK=6" --package fake-xapi --test soak
    try "FAKE_XAPI_SEED=$seed FAKE_XAPI_STEPS=4" --package fake-xapi --test steps struck
    try "FAKE_XAPI_SEED=$seed FAKE_XAPI_POWER=2" --package fake-xapi --test steps power
    try "FAKE_XAPI_SEED=$seed FAKE_XAPI_DISK=20" --package fake-xapi --test steps broken
    try "FAKE_XAPI_SEED=$seed FAKE_XAPI_PLANS=1 FAKE_XAPI_GC=true" --package fake-xapi --test migration random
    try "FAKE_XAPI_GC=true" --package fake-xapi --test conformance
    try "MIRROR_SEED=$seed" --package datapath --test difference random
    try "CONTENT_SEED=$seed" --package volume --test content walk
    try "CHECK_SEED=$seed" --package volume --test check
    try "FAKE_XAPI_SEED=$seed FAKE_XAPI_REQUESTS=40" --package fake-xapi --test requests
    try "FUZZ_SEED=$seed FUZZ_ROUNDS=5000" --package plugin --lib fuzz
    seed=$((seed + 1))
    rounds=$((rounds + 1))
done
echo "soak: $rounds rounds in $((($(date +%s) - until) / 60 + minutes)) minutes, all passed"
if [ "$steps" != none ]; then
    # Tells how many histories and strikes there were, and how long they took.
    try "FAKE_XAPI_STEPS=all FAKE_XAPI_SHARE=$steps" --package fake-xapi --test steps struck -- --nocapture
fi
