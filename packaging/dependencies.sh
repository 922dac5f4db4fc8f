#!/bin/sh
# Installs what the demo or the tests need and this machine lacks, by apt or dnf.
#
#   packaging/dependencies.sh [run|demo|test|packages]
#   packaging/dependencies.sh older|machine
#
# What is there already, whatever its version, is left as it is. Nothing is asked. Where it cannot install, it says
# what is missing and fails. `run` is what the plugins themselves need. The last two install nothing: `older` puts the
# programs of Debian 12's QEMU 7.2 into target/qemu-7.2, to be tested beside those of this machine, `machine` a kernel of
# Debian's and what runs it into target/machine (tests/machine.sh). They print the directory.
set -eu
export LC_ALL=C
PATH=$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:$HOME/.cargo/bin

# The oldest QEMU whose storage daemon does all that the plugins ask of it.
qemu_major=7
qemu_minor=0

say() { printf 'dependencies: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# Runs a command as root.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif have sudo; then
        # Without a terminal a password cannot be asked for.
        if [ -t 0 ]; then sudo "$@"; else sudo -n "$@"; fi
    else
        die "this needs root and there is no sudo: run as root: $*"
    fi
}

# Downloads packages into a directory, and puts what is in them there.
fetch() {
    into=$1
    shift
    { have apt-get && have dpkg-deb; } || die "this is no Debian machine: no packages"
    rm -rf -- "$into"
    mkdir -p -- "$into"
    for package in "$@"; do
        # On a fresh machine there are no lists of packages yet, or old ones.
        (cd "$into" && apt-get download "$package" >&2) ||
            { as_root apt-get update >&2 && (cd "$into" && apt-get download "$package" >&2); } ||
            die "Debian's archive has no $package for this machine"
        dpkg-deb --extract "$into/${package%%=*}"_*.deb "$into"
        rm -f -- "$into"/*.deb
    done
}

# Fetches QEMU 7.2 from Debian's archive, four megabytes, if it is not there already.
older() {
    directory=$(cd "$(dirname -- "$0")/.." && pwd)/target/qemu-7.2
    if [ ! -x "$directory/usr/bin/qemu-storage-daemon" ]; then
        fetch "$directory.new" 'qemu-system-common=1:7.2*' 'qemu-utils=1:7.2*'
        rm -rf -- "$directory"
        mv -- "$directory.new" "$directory"
    fi
    echo "$directory/usr/bin"
}

# Prints the packages that one needs, as their names are now, without those that are installed.
needs() {
    apt-cache depends --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances "$1" |
        sed -n 's/^ *Depends: *\([^<>]*\)$/\1/p' | while read -r package; do
        case $(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null) in
            installed) ;;
            *) echo "$package" ;;
        esac
    done
}

# Fetches Debian's kernel for virtual machines, QEMU with all that this machine lacks of it, and busybox, 60 megabytes, if
# they are not there already.
machine() {
    directory=$(cd "$(dirname -- "$0")/.." && pwd)/target/machine
    if [ ! -x "$directory/files/usr/bin/qemu-system-x86_64" ]; then
        apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1 || as_root apt-get update >&2
        kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: *\(linux-image-[0-9].*\)$/\1/p')
        [ -n "$kernel" ] || die "Debian's archive has no kernel for this machine"
        # shellcheck disable=SC2046 # a list of words
        fetch "$directory/new" "$kernel" busybox-static qemu-system-x86 $(needs qemu-system-x86)
        rm -rf -- "$directory/files"
        mv -- "$directory/new" "$directory/files"
    fi
    echo "$directory/files"
}

case ${1-} in
    older | machine)
        "$1"
        exit
        ;;
esac

case ${1-test} in
    run) programs='qemu-img qemu-storage-daemon' ;;
    packages) programs='cc rpmbuild dpkg-deb readelf' ;;
    demo) programs='cc qemu-img qemu-io qemu-storage-daemon mkfs.ext4 debugfs' ;;
    test) programs='cc qemu-img qemu-io qemu-storage-daemon mkfs.ext4 mkfs.xfs debugfs nbdcopy nbdinfo strace flock python3 fio rpm rpmbuild dpkg-deb readelf systemd-analyze chromium mandoc' ;;
    *) die "usage: $0 [run|demo|test|packages|older|machine]" ;;
esac

# Prints the programs that are missing.
missing() {
    for program in $programs; do
        have "$program" || printf '%s ' "$program"
    done
}

# Gives the Debian package that has a program.
debian_package() {
    case $1 in
        cc) echo 'gcc libc6-dev' ;;
        qemu-img | qemu-io) echo qemu-utils ;;
        mkfs.ext4 | debugfs) echo e2fsprogs ;;
        mkfs.xfs) echo xfsprogs ;;
        nbdcopy | nbdinfo) echo libnbd-bin ;;
        strace) echo strace ;;
        flock) echo util-linux ;;
        python3) echo python3 ;;
        fio) echo fio ;;
        rpm | rpmbuild) echo rpm ;;
        dpkg-deb) echo dpkg ;;
        readelf) echo binutils ;;
        chromium) echo chromium ;;
        mandoc) echo mandoc ;;
        systemd-analyze) echo systemd ;;
        qemu-storage-daemon)
            # qemu-utils has it since QEMU 8.2 (Debian 13, the backport for Debian 12), qemu-system-common before.
            version=$(apt-cache policy qemu-utils | sed -n 's/^ *Candidate: *//p')
            installed=$(apt-cache policy qemu-utils | sed -n 's/^ *Installed: *//p')
            case $installed in '' | '(none)') ;; *) version=$installed ;; esac
            if dpkg --compare-versions "$version" ge 1:8.2; then echo qemu-utils; else echo qemu-system-common; fi
            ;;
    esac
}

apt_install() {
    packages=''
    for program in $1; do
        packages="$packages $(debian_package "$program")"
    done
    # shellcheck disable=SC2086 # a list of words
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends --no-upgrade --no-remove \
        -o Dpkg::Use-Pty=0 $packages
}

lacking=$(missing)
if [ -n "$lacking" ]; then
    say "missing: $lacking"
    if have apt-get; then
        # On a fresh machine there are no lists of packages yet, or old ones.
        if ! apt-cache show qemu-utils >/dev/null 2>&1 || ! apt_install "$lacking" </dev/null; then
            as_root apt-get update || say "apt-get update failed"
            apt_install "$lacking" </dev/null || say "apt-get could not install all of it"
        fi
        # Where a release keeps the storage daemon in the other package.
        if ! have qemu-storage-daemon; then
            as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends --no-upgrade \
                --no-remove qemu-system-common </dev/null || true
        fi
    elif have dnf; then
        # dnf finds a package by a file that is in it.
        files=''
        for program in $lacking; do
            case $program in
                mkfs.ext4 | mkfs.xfs | debugfs) files="$files /usr/sbin/$program" ;;
                dpkg-deb) files="$files dpkg" ;;
                chromium) files="$files /usr/bin/chromium-browser" ;;
                *) files="$files /usr/bin/$program" ;;
            esac
        done
        # shellcheck disable=SC2086 # a list of words
        as_root dnf install -y $files </dev/null || say "dnf could not install all of it"
    else
        say "there is neither apt-get nor dnf here"
    fi
    hash -r
    lacking=$(missing)
    [ -z "$lacking" ] || die "still missing: $lacking- install them by hand (QEMU $qemu_major.$qemu_minor or newer," \
        "e2fsprogs, xfsprogs, libnbd's tools, strace, python3, fio, chromium, mandoc) and run this again"
fi

for program in qemu-img qemu-storage-daemon; do
    [ "${1-test}" != packages ] || break
    version=$("$program" --version | sed -n '1s/.*version \([0-9][0-9]*\)\.\([0-9][0-9]*\).*/\1 \2/p')
    [ -n "$version" ] || die "$program does not tell its version: $("$program" --version | head -n 1)"
    major=${version% *}
    minor=${version#* }
    if [ "$major" -lt "$qemu_major" ] || { [ "$major" -eq "$qemu_major" ] && [ "$minor" -lt "$qemu_minor" ]; }; then
        die "$program is $major.$minor; it has to be $qemu_major.$qemu_minor or newer, and this release's package" \
            "is older: install it from the distribution's backports"
    fi
done

case ${1-test} in
    run) exit 0 ;;
esac
have cargo || die "cargo is missing: install Rust (https://rustup.rs)"
if [ "${1-test}" = test ]; then
    for tool in clippy fmt; do
        if ! cargo "$tool" --version >/dev/null 2>&1; then
            case $tool in fmt) component=rustfmt ;; *) component=$tool ;; esac
            have rustup || die "cargo $tool is missing: install the Rust component $component"
            rustup component add "$component" || die "rustup could not add $component"
        fi
    done
fi
