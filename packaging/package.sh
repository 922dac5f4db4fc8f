#!/bin/sh
# Makes an RPM, a .deb or both of executables that were built.
#
#   [BUILD=target/release] [VERSION=…] [RELEASE=1] [COMPRESS=best|none] packaging/package.sh [--any] rpm|deb… <directory>
#
# The packages are for any distribution of this architecture, so it refuses executables that need shared libraries; with
# --any it takes them, for a try on the machine they were built on. `make packages` builds the right ones.
set -eu
umask 022
export LC_ALL=C

die() {
    printf 'package.sh: %s\n' "$*" >&2
    exit 1
}

packaging=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
build=$(CDPATH='' cd -- "${BUILD:-$packaging/../target/release}" && pwd)
version=${VERSION:-$(sed -n 's/^version = "\(.*\)"$/\1/p' "$packaging/../Cargo.toml")}
release=${RELEASE:-1}
any=false
kinds=''
while [ $# -gt 1 ]; do
    case $1 in
        --any) any=true ;;
        rpm | deb) kinds="$kinds $1" ;;
        *) break ;;
    esac
    shift
done
[ -n "$kinds" ] && [ $# -eq 1 ] || { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p -- "$1"
out=$(CDPATH='' cd -- "$1" && pwd)
if [ -z "${SOURCE_DATE_EPOCH:-}" ]; then
    SOURCE_DATE_EPOCH=$(git -C "$packaging" log -1 --format=%ct 2>/dev/null || date +%s)
fi
export SOURCE_DATE_EPOCH
case $(uname -m) in
    x86_64) architecture=amd64 ;;
    aarch64) architecture=arm64 ;;
    *) architecture=$(dpkg --print-architecture) ;;
esac

# Fails unless an executable runs whatever the C library of the host: it asks for no interpreter and no library.
is_static() {
    program=$(readelf -lW -- "$1") || die "$1 is no executable"
    dynamic=$(readelf -dW -- "$1")
    case "$program $dynamic" in
        *INTERP* | *"(NEEDED)"*) return 1 ;;
    esac
}

for name in xapi-storage-qcow2 xapi-storage-qcow2-datapath xapi-storage-qcow2-volume; do
    [ -x "$build/$name" ] || die "$build/$name is missing: build it first, or set BUILD"
    $any || is_static "$build/$name" || die "$build/$name is not linked statically (make packages; see docs/packages.md)"
done

stage=$(mktemp -d)
trap 'rm -rf -- "$stage"' EXIT
trap 'exit 1' HUP INT TERM

make_rpm() {
    payload=w6.xzdio
    [ "${COMPRESS:-best}" = best ] || payload=w1.gzdio
    rpmbuild -bb --quiet --define "_topdir $stage/rpm" --define "_rpmdir $out" --define '_rpmfilename %{NAME}-%{VERSION}-%{RELEASE}.%{ARCH}.rpm' \
        --define "_builddir $stage" --define "_dbpath $stage/db" --define 'use_source_date_epoch_as_buildtime 1' \
        --define 'clamp_mtime_to_source_date_epoch 1' --define '_buildhost localhost' --define "payload $payload" \
        --define "sources $packaging/.." --define "build $build" --define "number $version" --define "revision $release" \
        "$packaging/xapi-storage-qcow2.spec"
    printf '%s\n' "$out/xapi-storage-qcow2-$version-$release.$(uname -m).rpm"
}

make_deb() {
    tree=$stage/deb
    BUILD=$build "$packaging/tree.sh" "$tree"
    # A name of old that newer versions of systemd warn of.
    sed -i '/^MemoryLimit=/d' "$tree"/usr/lib/systemd/system/*.service
    # Where Debian's tools look for them.
    mv -- "$tree/usr/share/doc/xapi-storage-qcow2/LICENSE" "$tree/usr/share/doc/xapi-storage-qcow2/copyright"
    kibibytes=$(du -sk -- "$tree" | cut -f 1)
    mkdir -- "$tree/DEBIAN"
    sed "s/@VERSION@/$version-$release/; s/@ARCHITECTURE@/$architecture/; s/@KIBIBYTES@/$kibibytes/" \
        "$packaging/deb/control" >"$tree/DEBIAN/control"
    for script in postinst prerm postrm; do
        cp -- "$packaging/deb/$script" "$tree/DEBIAN/$script"
        chmod 0755 -- "$tree/DEBIAN/$script"
    done
    (cd -- "$tree" && find usr -type f -exec md5sum {} +) >"$tree/DEBIAN/md5sums"
    file=$out/xapi-storage-qcow2_$version-${release}_$architecture.deb
    compression=-Zxz
    [ "${COMPRESS:-best}" = best ] || compression=-Znone
    dpkg-deb --root-owner-group "$compression" --build "$tree" "$file" >/dev/null
    printf '%s\n' "$file"
}

for kind in $kinds; do
    "make_$kind"
done
