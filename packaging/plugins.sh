#!/bin/sh
# Makes the two plugins' directories, puts them where xapi-storage-script looks for them, or takes them away.
#
#   plugins.sh make <build> <directory>    <directory>/volume and <directory>/datapath, of executables in <build>
#   plugins.sh put <directory> <base>      copies both into <base>, which is /usr/libexec/xapi-storage-script
#   plugins.sh remove <base>
#   plugins.sh idle <root>                 fails and says why while SRs are attached on the host below <root>
#
# xapi-storage-script watches <base>/volume and <base>/datapath, and takes whatever appears there for a plugin, at once
# and once only. So a plugin's directory is made complete beside them, on the same file system, and put in place by a
# single rename. It holds the executable, a link to it under the name of each method, and what runs them when tracing
# is on (observer.py), so that an upgrade changes all together. An older directory is exchanged with the new one,
# because a moment without the name would be taken for the plugin's removal; calls that run go on in the old one.
# Packages ship the directories elsewhere and put them here when they are unpacked, for package managers unpack a
# directory file by file.
set -eu
umask 022
export LC_ALL=C

volume=volume/org.xen.xapi.storage.qcow2
datapath=datapath/qsd

die() {
    printf 'plugins.sh: %s\n' "$*" >&2
    exit 1
}

usage() {
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

# Makes one plugin's directory, complete: $1 the executable, $2 the directory.
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
    cp -- "$here/observer.py" "$2/observer.py"
    chmod 0644 -- "$2/observer.py"
}

# Holds the lock of a base and makes a directory `stage` beside the plugins' own. The lock is on the base itself and
# leaves no file.
begin() {
    exec 9<"$1"
    if command -v flock >/dev/null 2>&1; then
        flock 9
        # What an installation left that was killed.
        rm -rf -- "$1"/.xapi-storage-qcow2.*
    fi
    stage=$(mktemp -d -- "$1/.xapi-storage-qcow2.XXXXXX")
    trap 'rm -rf -- "$stage"' EXIT
    trap 'exit 1' HUP INT TERM
}

# Puts a complete directory in place of what is there: $1 new, $2 in place.
put_one() {
    if [ ! -e "$2" ] && [ ! -L "$2" ]; then
        mv -T -- "$1" "$2"
    elif [ -d "$2" ] && [ ! -L "$2" ]; then
        # In one system call, which mv has only since coreutils 9.5.
        "$exchange" exchange-names "$1" "$2" || die "$2 cannot be exchanged on this file system: stop" \
            "xapi-storage-script, then uninstall and install again"
    else
        die "$2 is there and is no directory"
    fi
    printf 'installed %s\n' "$2"
}

put() {
    mkdir -p -- "$2/volume" "$2/datapath"
    begin "$2"
    for root in "$2/volume" "$2/datapath"; do
        if [ "$(stat -L -c %d -- "$root")" != "$(stat -c %d -- "$stage")" ]; then
            die "$root is on another file system than $2: a plugin cannot be put there in one rename"
        fi
    done
    for plugin in datapath volume; do
        cp -a -- "$1/$plugin" "$stage/$plugin"
    done
    if [ "$(id -u)" -eq 0 ]; then
        chown -R -h 0:0 -- "$stage/datapath" "$stage/volume"
    fi
    # The files have to be on the disk before their names are.
    sync -f "$stage" 2>/dev/null || sync
    # Not the one that is exchanged: its path would lead to the old one in the middle.
    exchange=$1/datapath/xapi-storage-qcow2-datapath
    # The datapath first: the volume plugin names it in the URIs it gives.
    put_one "$stage/datapath" "$2/$datapath"
    put_one "$stage/volume" "$2/$volume"
}

remove() {
    [ -d "$1" ] || return 0
    begin "$1"
    for plugin in "$1/$volume" "$1/$datapath"; do
        if [ -d "$plugin" ]; then
            mv -- "$plugin" "$stage/"
            printf 'removed %s\n' "$plugin"
        fi
    done
}

idle() {
    run=${1%/}/run/xapi-storage-qcow2
    for record in "$run"/srs/*.json "$run"/volumes/*/state.json; do
        [ -e "$record" ] || continue
        if [ "${record##*/}" = state.json ]; then
            record=${record%/*}
            printf 'volume %s is in use\n' "${record##*/}" >&2
        else
            record=${record##*/}
            printf 'SR %s is attached\n' "${record%.json}" >&2
        fi
        busy=true
    done
    ${busy-false} || return 0
    die "it cannot be removed while SRs are attached: detach each from this host first (xe pbd-unplug uuid=…)"
}

case ${1-}:$# in
    make:3)
        here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
        make_plugin "$2/xapi-storage-qcow2-datapath" "$3/datapath"
        make_plugin "$2/xapi-storage-qcow2-volume" "$3/volume"
        ;;
    put:3) put "$2" "$3" ;;
    remove:2) remove "$2" ;;
    idle:2) idle "$2" ;;
    *) usage ;;
esac
