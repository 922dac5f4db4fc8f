#!/bin/sh
# Lays out what a package has in it below a directory that is empty or missing.
#
#   [BUILD=target/release] packaging/tree.sh <directory>
#
# The plugins' directories are complete, but not where xapi-storage-script looks: the maintainer scripts put them there
# (packaging/plugins.sh).
set -eu
umask 022
export LC_ALL=C

[ $# -eq 1 ] || { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
root=$1
packaging=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
build=${BUILD:-$packaging/../target/release}

# Puts a file: $1 the file, $2 the directory below the root, $3 its mode.
place() {
    mkdir -p -- "$root$2"
    cp -- "$1" "$root$2/"
    chmod "$3" -- "$root$2/${1##*/}"
}

lib=/usr/lib/xapi-storage-qcow2
place "$packaging/plugins.sh" "$lib" 0755
"$packaging/plugins.sh" make "$build" "$root$lib"
place "$build/xapi-storage-qcow2" /usr/sbin 0755
for unit in "$packaging"/systemd/*.service; do
    place "$unit" /usr/lib/systemd/system 0644
done
for page in "$packaging"/man/*.[1-8]; do
    # fake-xapi is not for hosts.
    case ${page##*/} in fake-xapi.*) continue ;; esac
    place "$page" "/usr/share/man/man${page##*.}" 0644
    # Without the time, so that the same sources make the same package.
    gzip -9 -n "$root/usr/share/man/man${page##*.}/${page##*/}"
done
for text in "$packaging"/../README.md "$packaging"/../CHANGELOG.md "$packaging"/../LICENSE "$packaging"/THIRD-PARTY-LICENSES; do
    [ ! -e "$text" ] || place "$text" /usr/share/doc/xapi-storage-qcow2 0644
done
for text in "$packaging"/../docs/*.md; do
    place "$text" /usr/share/doc/xapi-storage-qcow2/docs 0644
done
