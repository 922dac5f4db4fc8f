#!/bin/sh
# Installs the two plugins where xapi-storage-script looks for them and the administrator's program, or removes them.
#
#   [DESTDIR=…] [PREFIX=/usr] [BUILD=target/release] packaging/install.sh [--uninstall]
#
# xapi-storage-script watches <PREFIX>/libexec/xapi-storage-script/volume and …/datapath, and takes whatever
# appears there for a plugin, at once and once only. So a plugin's directory is made complete beside them, on the
# same file system, and put in place by a single rename. It holds the executable, a link to it under the name of each
# method, and what runs them when tracing is on (observer.py), so that an upgrade changes all together. An older directory is exchanged with the new one, because
# a moment without the name would be taken for the plugin's removal; calls that run go on in the old one.
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

# Gives two directories each other's name in one system call.
exchange() {
    if mv --help 2>/dev/null | grep -q -e --exchange; then
        mv --exchange --no-target-directory -- "$1" "$2"
        return
    fi
    # No coreutils 9.5: renameat2(2) itself, with RENAME_EXCHANGE. An absolute path needs no directory descriptor.
    case $(uname -m) in
        x86_64) number=316 ;;
        aarch64) number=276 ;;
        *) die "this needs GNU coreutils 9.5 or newer on $(uname -m), to exchange two directories" ;;
    esac
    if command -v python3 >/dev/null 2>&1; then
        python3 - "$number" "$1" "$2" <<'PYTHON'
import ctypes, os, sys
number, new, old = int(sys.argv[1]), os.fsencode(sys.argv[2]), os.fsencode(sys.argv[3])
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(ctypes.c_long(number), -1, ctypes.c_char_p(new), -1, ctypes.c_char_p(old), ctypes.c_uint(2)) != 0:
    sys.exit("install.sh: renameat2: " + os.strerror(ctypes.get_errno()))
PYTHON
    elif command -v perl >/dev/null 2>&1; then
        perl -e 'my ($n, $new, $old) = @ARGV;
            syscall($n + 0, -1, $new, -1, $old, 2) == 0 or die "install.sh: renameat2: $!\n"' "$number" "$1" "$2"
    else
        die "this needs GNU coreutils 9.5 or newer, python3 or perl, to exchange two directories"
    fi
}

# Makes a plugin's directory, complete: $1 the executable, $2 the directory.
make_plugin() {
    [ -x "$1" ] || die "$1 is missing: run 'cargo build --release' first, or set BUILD"
    name=${1##*/}
    methods=$("$1" --list-methods) || die "$1 cannot be run on this machine"
    [ -n "$methods" ] || die "$1 has no methods"
    mkdir -- "$2"
    cp -- "$1" "$2/$name"
    chmod 0755 -- "$2" "$2/$name"
    for method in $methods; do
        case $method in
            *[!A-Za-z_.]* | [!A-Z]* | *.*.* | *.) die "$1 lists '$method', which is no method's name" ;;
            *.*) ln -s -- "$name" "$2/$method" ;;
            *) die "$1 lists '$method', which is no method's name" ;;
        esac
    done
    cp -- "$here/packaging/observer.py" "$2/observer.py"
    chmod 0644 -- "$2/observer.py"
    if [ "$(id -u)" -eq 0 ]; then
        chown -R -h 0:0 -- "$2"
    fi
}

# Puts a complete directory in place of what is there: $1 new, $2 in place.
put() {
    if [ ! -e "$2" ] && [ ! -L "$2" ]; then
        mv --no-target-directory -- "$1" "$2"
    elif [ -d "$2" ] && [ ! -L "$2" ]; then
        exchange "$1" "$2" || die "$2 cannot be exchanged on this file system: stop xapi-storage-script, then" \
            "uninstall and install again"
    else
        die "$2 is there and is no directory"
    fi
    printf 'installed %s\n' "$2"
}

uninstall=false
case $#:${1-} in
    0:) ;;
    1:--uninstall) uninstall=true ;;
    1:-h | 1:--help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
esac

here=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
build=${BUILD:-$here/target/release}
prefix=${PREFIX:-/usr}
case $prefix in /*) ;; *) die "PREFIX is not an absolute path: $prefix" ;; esac
base=${DESTDIR:-}$prefix/libexec/xapi-storage-script
case $base in /*) ;; *) base=$PWD/$base ;; esac
program=${DESTDIR:-}$prefix/sbin/xapi-storage-qcow2
case $program in /*) ;; *) program=$PWD/$program ;; esac
volume=$base/volume/org.xen.xapi.storage.qcow2
datapath=$base/datapath/qsd

if $uninstall && [ -e "$program" ]; then
    rm -f -- "$program"
    printf 'removed %s\n' "$program"
fi
if $uninstall && [ ! -d "$base" ]; then
    exit 0
fi
mkdir -p -- "$base"
$uninstall || mkdir -p -- "$base/volume" "$base/datapath"

# One at a time; the lock is on the directory and leaves no file.
exec 9<"$base"
if command -v flock >/dev/null 2>&1; then
    flock 9
    # What an installation left that was killed.
    rm -rf -- "$base"/.xapi-storage-qcow2.*
fi

stage=$(mktemp -d -- "$base/.xapi-storage-qcow2.XXXXXX")
trap 'rm -rf -- "$stage"' EXIT
trap 'exit 1' HUP INT TERM

if $uninstall; then
    for plugin in "$volume" "$datapath"; do
        if [ -d "$plugin" ]; then
            mv -- "$plugin" "$stage/"
            printf 'removed %s\n' "$plugin"
        fi
    done
    exit 0
fi

for root in "$base/volume" "$base/datapath"; do
    if [ "$(stat -L -c %d -- "$root")" != "$(stat -c %d -- "$stage")" ]; then
        die "$root is on another file system than $base: a plugin cannot be put there in one rename"
    fi
done
make_plugin "$build/xapi-storage-qcow2-datapath" "$stage/datapath"
make_plugin "$build/xapi-storage-qcow2-volume" "$stage/volume"
[ -x "$build/xapi-storage-qcow2" ] || die "$build/xapi-storage-qcow2 is missing: run 'cargo build --release' first, or set BUILD"
mkdir -p -- "${program%/*}"
cp -- "$build/xapi-storage-qcow2" "$program.new"
chmod 0755 -- "$program.new"
if [ "$(id -u)" -eq 0 ]; then
    chown 0:0 -- "$program.new"
fi
# The files have to be on the disk before their names are.
sync -f "$stage" 2>/dev/null || sync
# A program that runs keeps the file that it was started from.
mv --no-target-directory -- "$program.new" "$program"
printf 'installed %s\n' "$program"
# The datapath first: the volume plugin names it in the URIs it gives.
put "$stage/datapath" "$datapath"
put "$stage/volume" "$volume"
if [ -z "${DESTDIR:-}" ]; then
    echo "restart the toolstack (xe-toolstack-restart) so that xapi learns of the SR type and its features"
fi
