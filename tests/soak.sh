#!/bin/sh
# Tries what is random with ever new seeds until its time is up: VMs to which everything happens at once, histories struck
# at system calls, power cuts, broken disks, migrations, mirrors of differences, promises about contents, damage, mutated
# requests, what others send. Ends at the first failure, with the command that repeats it. Each round also does one part of
# SOAK_SHARES (300) of every short history struck everywhere, the next one each time.
#
#   tests/soak.sh [minutes]       30 if not given; SOAK_SEED=<number> begins with another seed
set -eu
cd "$(dirname -- "$0")/.."
PATH=$PATH:$HOME/.cargo/bin
minutes=${1-30}
seed=${SOAK_SEED-$(date +%s)}
shares=${SOAK_SHARES-300}
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
    try "FAKE_XAPI_STEPS=all FAKE_XAPI_SHARE=$((seed % shares))/$shares" --package fake-xapi --test steps struck
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
echo "soak: $rounds rounds, all passed"
