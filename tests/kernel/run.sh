#!/usr/bin/env bash
# Holds what thintools writes and serves against the real kernel, in virtual machines: tests/kernel/run.sh THINTOOLS. Takes some minutes.
#
# Needs QEMU and a Debian kernel. Where they are missing and cannot be installed, says so and succeeds.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tool=$1
packages=()

need() {
    [[ -n $(PATH=$PATH:/usr/sbin:/sbin command -v "$1") ]] || packages+=("$2")
}

need qemu-system-x86_64 qemu-system-x86
need busybox busybox-static
need cpio cpio
need modprobe kmod
need dmsetup dmsetup
need zstd zstd
need nbd-client nbd-client
need mkfs.ext4 e2fsprogs
/usr/bin/python3 -c 'import nbd' 2>/dev/null || packages+=(python3 python3-libnbd)
if ! compgen -G '/lib/modules/*/kernel/drivers/md/dm-thin-pool.ko*' >/dev/null; then
    packages+=(linux-image-amd64)
fi
if ((${#packages[@]} > 0)); then
    echo "installing: ${packages[*]}"
    as_root=()
    ((EUID == 0)) || as_root=(sudo -n)
    if ! "${as_root[@]}" timeout 120 apt-get update >/dev/null 2>&1 ||
        ! "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive timeout 600 \
            apt-get install --yes --no-install-recommends "${packages[@]}" >/dev/null 2>&1; then
        echo "SKIPPED: the real kernel was not asked, since these packages cannot be installed: ${packages[*]}"
        exit 0
    fi
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 "$here/hold.py" "$tool" "$folder"
mkdir "$folder/served"
/usr/bin/python3 "$here/serve.py" "$tool" "$folder/served"
