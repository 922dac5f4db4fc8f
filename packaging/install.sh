#!/bin/sh
# Installs the two plugins where xapi-storage-script looks for them and the administrator's program, or removes them.
#
#   [DESTDIR=…] [PREFIX=/usr] [BUILD=target/release] packaging/install.sh [--uninstall]
#
# The plugins' directories appear, are exchanged and go whole: packaging/plugins.sh says how and why. Packages for
# package managers are made by packaging/package.sh.
set -eu
umask 022
export LC_ALL=C

die() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

usage() {
    sed -n '2,4s/^# \{0,1\}//p' "$0"
}

uninstall=false
case $#:${1-} in
    0:) ;;
    1:--uninstall) uninstall=true ;;
    1:-h | 1:--help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
esac

packaging=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
build=${BUILD:-$packaging/../target/release}
prefix=${PREFIX:-/usr}
case $prefix in /*) ;; *) die "PREFIX is not an absolute path: $prefix" ;; esac
# Makes a path absolute.
absolute() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s' "$PWD/$1" ;; esac; }
base=$(absolute "${DESTDIR:-}$prefix/libexec/xapi-storage-script")
program=$(absolute "${DESTDIR:-}$prefix/sbin/xapi-storage-qcow2")
units=$(absolute "${DESTDIR:-}$prefix/lib/systemd/system")

# Has systemd read its units again, where it runs and they are its.
reload() {
    if [ -z "${DESTDIR:-}" ] && [ -d /run/systemd/system ]; then
        systemctl daemon-reload || true
    fi
}

if $uninstall; then
    "$packaging/plugins.sh" idle "$(absolute "${DESTDIR:-/}")"
    "$packaging/plugins.sh" remove "$base"
    for file in "$program" "$units"/xapi-storage-qcow2-*@.service; do
        if [ -e "$file" ]; then
            rm -f -- "$file"
            printf 'removed %s\n' "$file"
        fi
    done
    reload
    exit 0
fi

stage=$(mktemp -d)
trap 'rm -rf -- "$stage"' EXIT
trap 'exit 1' HUP INT TERM
"$packaging/plugins.sh" make "$build" "$stage"
[ -x "$build/xapi-storage-qcow2" ] || die "$build/xapi-storage-qcow2 is missing: run 'cargo build --release' first, or set BUILD"

# Puts a file in place: $1 the file, $2 where, $3 its mode. A program that runs keeps the file that it was started from.
place() {
    mkdir -p -- "${2%/*}"
    cp -- "$1" "$2.new"
    chmod "$3" -- "$2.new"
    if [ "$(id -u)" -eq 0 ]; then
        chown 0:0 -- "$2.new"
    fi
    sync -f "$2.new" 2>/dev/null || sync
    mv -T -- "$2.new" "$2"
    printf 'installed %s\n' "$2"
}

place "$build/xapi-storage-qcow2" "$program" 0755
for unit in "$packaging"/systemd/*.service; do
    sed "s|/usr/libexec/|$prefix/libexec/|g" "$unit" >"$stage/unit"
    place "$stage/unit" "$units/${unit##*/}" 0644
done
"$packaging/plugins.sh" put "$stage" "$base"
reload
if [ -z "${DESTDIR:-}" ]; then
    echo "restart the toolstack (xe-toolstack-restart) so that xapi learns of the SR type and its features"
fi
