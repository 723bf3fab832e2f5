#!/usr/bin/env bash
# Records traces of the real kernel's pools: tests/kernel/record.sh FOLDER [CASE...]. Makes FOLDER/CASE for each case, which must not
# exist; record-guest.sh has the cases. What is in testdata/traces/kernel was made so. The kernel decides the order of what is under way
# at once, so that another recording is another trace. Needs, as Debian packages: qemu-system-x86 busybox-static cpio kmod dmsetup
# linux-image-amd64 blktrace fio util-linux thin-provisioning-tools zstd.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$1
shift
cases=("$@")
((${#cases[@]} > 0)) || cases=(snapshots space-queue space-error origin origin-skip large-default large-256 large-1280 no-passdown ignore together)
export PATH=$PATH:/usr/sbin:/sbin
share=
trap 'rm -rf "$share"' EXIT
for name in "${cases[@]}"; do
    [[ ! -e $folder/$name ]] || { echo "$folder/$name exists" >&2; exit 1; }
    share=$(mktemp -d)
    cpus=1
    case $name in snapshots | space-queue | together) cpus=2 ;; esac
    "$here/run-in-kernel" --share "$share" --smp $cpus --timeout 500 --module null_blk --stats \
        --with blktrace --with fio --with thin_dump --with thin_check --with dd --with blkdiscard --with dmsetup \
        "$here/record-guest.sh" "$name"
    gzip -9 "$share/$name"/phase-*.xml
    zstd -q --rm -19 "$share/$name"/*.blktrace.*
    mkdir -p "$folder"
    mv "$share/$name" "$folder/$name"
    rmdir "$share"
done
