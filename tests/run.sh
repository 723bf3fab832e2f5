#!/usr/bin/env bash
# Runs every check that a change has to pass, on Debian 12 with a Rust toolchain. Stops at the first failure.
#
# Debian packages are installed only if a program is missing:
#   thin-provisioning-tools  thin_check and thin_restore 0.9, which the tests hold the output of thintools against
#   gcc, libc6-dev           the linker, and the compiler for the C code of the zstd package
#   libnbd-bin, python3-libnbd, qemu-utils, fio  the clients that the NBD server is tested with
#   fuse3, e2fsprogs, xfsprogs, util-linux, mount  file systems on the files of thin_serve --fuse
#   openssl                  makes the certificates that TLS is tested with
#   python3                  for the scripts that score repairs and hold images against the kernel
# and, where they can be installed, QEMU and a kernel (tests/kernel/run.sh); without them that step says that it is skipped.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

step() {
    printf '\n== %s ==\n' "$1"
}

# Says whether a program is there. System tools may not be in the search path of an ordinary user.
have() {
    command -v "$1" >/dev/null || [[ -x /usr/sbin/$1 ]]
}

install_missing() {
    local packages=()
    if [[ ! -x /usr/sbin/thin_check || ! -x /usr/sbin/thin_restore ]]; then
        packages+=(thin-provisioning-tools)
    fi
    if ! have cc; then
        packages+=(gcc libc6-dev)
    fi
    if ! have python3; then
        packages+=(python3)
    fi
    if ! have nbdcopy || ! have nbdfuse || ! have qemu-io || ! have fio; then
        packages+=(libnbd-bin qemu-utils fio)
    fi
    if ! have openssl; then
        packages+=(openssl)
    fi
    if ! /usr/bin/python3 -c 'import nbd' 2>/dev/null; then
        packages+=(python3-libnbd)
    fi
    if ! have fusermount3 || ! have mkfs.ext4 || ! have mkfs.xfs || ! have fstrim || ! have setpriv || ! have losetup; then
        packages+=(fuse3 e2fsprogs xfsprogs util-linux mount)
    fi
    if ((${#packages[@]} == 0)); then
        echo 'nothing is missing'
        return
    fi
    echo "installing: ${packages[*]}"
    local as_root=()
    if ((EUID != 0)); then
        if ! have sudo; then
            echo "error: not root, and there is no sudo; install as root: ${packages[*]}" >&2
            return 1
        fi
        as_root=(sudo)
    fi
    "${as_root[@]}" apt-get update
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install --yes --no-install-recommends "${packages[@]}"
}

step 'Debian packages'
install_missing

step 'Rust toolchain'
if ! have cargo && [[ -x ${HOME:-/root}/.cargo/bin/cargo ]]; then
    PATH=${HOME:-/root}/.cargo/bin:$PATH
fi
if ! have cargo; then
    echo 'error: there is no cargo; install a Rust toolchain with rustfmt and clippy' >&2
    exit 1
fi
cargo --version
cargo fmt --version
cargo clippy --version

step 'Format'
cargo fmt --all --check

step 'Lints'
cargo clippy --locked --all-targets -- --deny warnings
cargo clippy --locked --all-targets --features devtools -- --deny warnings

step 'Tests'
cargo test --locked --release --features devtools

step 'Real kernel'
tests/kernel/run.sh "${CARGO_TARGET_DIR:-target}/release/thintools"

step 'Models'
# Every order of the steps of the commit barrier, the optimistic read and the guards that the memory model allows.
RUSTFLAGS='--cfg loom' cargo test --locked --release --lib --target-dir target/loom models

step 'Documentation'
RUSTDOCFLAGS='--deny warnings' cargo doc --locked --no-deps --features devtools

step 'All checks passed'
