# Runs in the guest. Disks: metadata and data of a pool that thin_serve wrote, an external origin, and the same two of a pool that is made
# here. /host/thins has the thin devices of the first: id, sectors, and the origin's disk if there is one. /host/random is what is written.
# NBD is the port of thin_serve on the host. SUM lines say what each device holds; RESULT says what went wrong.
bad=0 said=
wrong() { said="$said; $*"; bad=$((bad + 1)); }
sums() {
    for d in $(dmsetup ls | awk '{print $1}' | grep "^$1[0-9]" | sort); do
        echo "SUM $2 ${d#$1} $(sha256sum </dev/mapper/$d | cut -d' ' -f1)"
    done
}
# Bytes 4096 * $2 of the random file, from $3 on, to device $1 at $4; the last three in units of $5 bytes.
put() { dd if=/host/random of=/dev/mapper/$1 bs=$5 count=$2 skip=$3 seek=$4 conv=notrunc,fsync 2>/tmp/err || wrong "write $*: $(cat /tmp/err)"; }
message() { pool=$1; shift; dmsetup message $pool 0 "$*" || wrong "$pool: $*"; }
# A snapshot of a device that is active: $1 prefix, $2 pool, $3 new id, $4 of which, the rest is the origin.
snapshot() {
    prefix=$1 pool=$2 new=$3 of=$4; shift 4
    dmsetup suspend $prefix$of
    message $pool create_snap $new $of
    dmsetup resume $prefix$of
    thin $prefix $pool $new $(blockdev --getsz /dev/mapper/$prefix$of) $*
}
thin() {
    prefix=$1 pool=$2 id=$3 sectors=$4; shift 4
    dmsetup create $prefix$id --table "0 $sectors thin /dev/mapper/$pool $id $*" || wrong "$prefix$id"
}
pool() { dmsetup create $1 --table "0 $(blockdev --getsz $3) thin-pool $2 $3 128 0" || wrong "pool $1"; }
remove() {
    for d in $(dmsetup ls | awk '{print $1}' | grep "^$1[0-9]"); do dmsetup remove $d || wrong "remove $d"; done
    dmsetup status $2 | grep -q ' rw .* - ' || wrong "$2 is not writable at the end"
    dmsetup remove $2 || wrong "remove $2"
}

# What thin_serve wrote is read, and written on.
pool ours /dev/vda /dev/vdb
while read -r id sectors origin; do thin o ours $id $sectors $origin; done </host/thins
sums o ours
put o0 3 7 100 4096
put o1 40 0 5 65536
put o2 1 9 3000 512
put o3 2 1 11 65536
snapshot o ours 5 2 /dev/vdc
put o2 1 2 8 65536
put o5 5 20 1 4096
blkdiscard -o 1048576 -l 1048576 /dev/mapper/o0 || wrong discard
sums o ours-after
remove o ours

# What is made here is to be read by thin_serve.
pool kernels /dev/vdd /dev/vde
message kernels create_thin 0
message kernels create_thin 2
thin k kernels 0 16384
thin k kernels 2 12288 /dev/vdc
put k0 30 0 2 65536
put k2 3 4 5 4096
put k2 1 8 5000 512
snapshot k kernels 1 0
snapshot k kernels 3 2 /dev/vdc
put k0 9 50 7 65536
put k1 2 3 40 4096
put k2 70 0 1300 4096
put k3 1 1 1 512
snapshot k kernels 4 1
blkdiscard -o 524288 -l 1048576 /dev/mapper/k1 || wrong discard
sums k kernels
remove k kernels

# Exports of thin_serve as disks: a file system on one, blocks on the other.
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
for id in 0 1; do
    nbd-client 10.0.2.2 $NBD /dev/nbd$id -N $id -C 2 >/tmp/err 2>&1 || wrong "nbd-client $id: $(tail -n 1 /tmp/err)"
done
mkfs.ext4 -q -E nodiscard /dev/nbd0 2>/tmp/err || wrong "mkfs: $(cat /tmp/err)"
mkdir -p /mnt
mount /dev/nbd0 /mnt || wrong mount
cp /host/random /mnt/kept
cp /host/random /mnt/gone
sync
rm /mnt/gone
sync
fstrim /mnt || wrong fstrim
umount /mnt || wrong umount
dd if=/host/random of=/dev/nbd1 bs=65536 seek=3 oflag=direct 2>/tmp/err || wrong "nbd write: $(cat /tmp/err)"
blkdiscard -o 393216 -l 524288 /dev/nbd1 || wrong "nbd discard"
dd if=/host/random of=/dev/nbd1 bs=512 count=5 seek=1001 conv=fsync 2>/tmp/err || wrong "nbd write: $(cat /tmp/err)"
echo 3 >/proc/sys/vm/drop_caches
echo "SUM nbd 1 $(sha256sum </dev/nbd1 | cut -d' ' -f1)"
for id in 0 1; do nbd-client -d /dev/nbd$id >/dev/null 2>&1 || wrong "detach $id"; done
dmesg | grep -i "nbd.*error" && wrong "I/O errors of nbd"
echo "RESULT bad=$bad $said"
