#!/bin/sh
# Runs the tests of block devices in a machine of its own, whose kernel is Debian's: it has the nbd driver, which the kernel
# of a test's machine may lack.
#
#   tests/machine.sh              every test of block devices, on nbd devices and on loop devices
#   tests/machine.sh nbd [TEST]   the one kind alone, or what has TEST in its name
#   tests/machine.sh loop [TEST]
#
# packaging/dependencies.sh fetches kernel and QEMU into target/machine and installs nothing. The machine's file system is
# made of the executables that were built here, of programs of this machine, and of what both are linked with. It has no
# disk and no network, and two processors and 3 GiB of memory, emulated where KVM cannot run it. What it says goes to
# target/machine/<kind>.log.
set -eu
cd "$(dirname -- "$0")/.."
PATH=$PATH:$HOME/.cargo/bin:/usr/sbin:/sbin
top=$(pwd)
# How long one kind may take, in seconds: an emulated machine is some twenty times slower.
patience=${MACHINE_PATIENCE-1500}

programs=$(packaging/dependencies.sh machine)
machine=$(dirname -- "$programs")
busybox=$programs/bin/busybox
kernel=$(find "$programs/boot" -name 'vmlinuz-*' | head -n 1)
release=${kernel##*/vmlinuz-}

# Prints the executable of a test.
built() {
    cargo test --no-run --message-format=json "$@" |
        sed -n 's/.*"kind":\["test"\].*"executable":"\([^"]*\)".*/\1/p' | tail -n 1
}

cargo build --workspace
path=$(built --package datapath --test path)
device=$(built --package fake-xapi --test device)

# Puts a file, and the libraries that it is linked with, where they are here.
root=$machine/root
put() {
    for file in "$1" $(ldd "$1" 2>/dev/null | sed -n 's/.*=> \(\/[^ ]*\).*/\1/p; s/^[[:space:]]*\(\/[^ ]*\) (.*/\1/p'); do
        [ -e "$root$file" ] || { mkdir -p "$root$(dirname -- "$file")" && cp -L -- "$file" "$root$file"; }
    done
}

rm -rf -- "$root"
mkdir -p "$root/bin" "$root/sbin" "$root/usr/bin" "$root/usr/sbin" "$root/proc" "$root/sys" "$root/dev" "$root/tmp" \
    "$root/run" "$root/etc" "$root/lib/modules/$release"
for program in qemu-img qemu-io qemu-storage-daemon mkfs.ext4 e2fsck fio blkdiscard losetup mount umount; do
    put "$(command -v "$program")"
done
for executable in "$path" "$device" target/debug/fake-xapi target/debug/xapi-storage-qcow2-datapath \
    target/debug/xapi-storage-qcow2-volume; do
    case $executable in /*) ;; *) executable=$top/$executable ;; esac
    put "$executable"
    strip --strip-debug "$root$executable"
done
cp -- "$busybox" "$root/bin/busybox"
# None of them needs another.
find "$programs/lib/modules/$release" \( -name 'nbd.ko*' -o -name 'loop.ko*' -o -name 'fuse.ko*' \) \
    -exec cp -- {} "$root/lib/modules/$release/" \;
"$busybox" depmod -b "$root" "$release"
echo 0123456789abcdef0123456789abcdef >"$root/etc/machine-id"
cat >"$root/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mkdir -p /dev/shm
/bin/busybox mount -t tmpfs -o size=1g tmp /tmp
/bin/busybox mount -t tmpfs -o size=256m shm /dev/shm
/bin/busybox mount -t tmpfs run /run
/bin/busybox --install -s
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root RUST_BACKTRACE=1
modprobe loop && modprobe fuse
. /arguments
for executable in $executables; do
    cd "${executable%/target/*}" || exit
    if [ "${executable%/path-*}" = "$executable" ]; then only=$name; else only=${name:-device::}; fi
    # shellcheck disable=SC2086 # several words
    TESTED_SLOWNESS=$slowness TESTED_DEVICE=$kind "$executable" --test-threads 2 $only || failed=1
done
dmesg | grep -E 'BUG|WARNING|Oops|hung task|blocked for more' && failed=1
ls /sys/block | grep -E '^nbd' | while read -r left; do [ ! -e "/sys/block/$left/pid" ] || echo "machine: $left is left"; done
echo "machine: $(uname -r) ended with ${failed-0}"
poweroff -f
INIT
chmod +x "$root/init"

# Emulated unless this processor can do better.
accelerator=tcg,thread=multi
processor=max
slowness=10
if grep -qwE 'vmx|svm' /proc/cpuinfo && [ -w /dev/kvm ]; then
    accelerator=kvm
    processor=host
    slowness=1
fi

run() {
    kind=$1
    name=${2-}
    log=$machine/$kind.log
    printf 'kind=%s\nname=%s\nslowness=%s\nexecutables="%s"\n' "$kind" "$name" "$slowness" "$path $device" >"$root/arguments"
    (cd "$root" && find . | "$busybox" cpio -o -H newc 2>/dev/null) >"$machine/initramfs"
    echo "machine: Linux $release, $accelerator, $kind devices"
    LD_LIBRARY_PATH=$programs/usr/lib/x86_64-linux-gnu QEMU_MODULE_DIR=$programs/usr/lib/x86_64-linux-gnu/qemu \
        timeout --foreground "$patience" "$programs/usr/bin/qemu-system-x86_64" -nodefaults -no-user-config -display none \
        -no-reboot -L "$programs/usr/share/qemu" -L "$programs/usr/share/seabios" -accel "$accelerator" -cpu "$processor" \
        -smp 2 -m 3072 -serial stdio -kernel "$kernel" -initrd "$machine/initramfs" \
        -append "console=ttyS0 quiet panic=-1 oops=panic" </dev/null | sed -u 's/\r$//' | tee "$log" | grep -vE '^(SeaBIOS|$)' || true
    if ! grep -q '^machine: .* ended with 0$' "$log" || grep -q '^machine: .* is left$' "$log"; then
        echo "machine: $kind devices failed; $log has it all" >&2
        return 1
    fi
}

if [ $# -gt 0 ]; then
    run "$@"
else
    run nbd
    run loop
fi
