# Runs in the guest: record-guest.sh CASE. Does to a pool of the kernel what the case says, with blktrace on its thin devices, and leaves
# in /host/CASE what blktrace wrote; about.txt: how the pool was made; and for each mark status-NAME.txt: dmsetup status of the pool and
# then of each thin device, phase-NAME.xml: thin_dump of a metadata snapshot, counts-NAME.txt: how often functions of dm-thin were
# called since the last mark.
set -eu
case=$1
out=/host/$case
debug=/sys/kernel/debug
mkdir -p $out /sys/kernel/config /t
mount -t configfs none /sys/kernel/config
# Without the device that it makes by itself.
rmmod null_blk
insmod /lib/mod/null_blk.ko nr_devices=0
cd $out

# null_blk NAME MIB BLOCKSIZE DISCARD [MAX_SECTORS]
null_blk() {
    d=/sys/kernel/config/nullb/$1
    mkdir $d
    echo 1 >$d/memory_backed
    echo 2 >$d/queue_mode
    echo $3 >$d/blocksize
    echo $2 >$d/size
    echo $4 >$d/discard
    [ -z "${5-}" ] || echo $5 >$d/max_sectors
    echo 1 >$d/power
}

# pool METADATA_MIB DATA_SECTORS BLOCK_SECTORS LOW_WATER [FEATURE...]: dm-0 is the data device, of max_sectors $most if that is set, and
# dm-1 the pool
pool() {
    null_blk nullb0 $1 4096 0
    null_blk nullb1 256 512 1 ${most-}
    dd if=/dev/zero of=/dev/nullb0 bs=4k count=1 2>/dev/null
    data_sectors=$2 block=$3 low=$4
    shift 4
    features="$# $*"
    dmsetup create data --table "0 $data_sectors linear /dev/nullb1 0"
    dmsetup create pool --table "$(pool_table)"
    echo "pool: $(dmsetup table pool)" >about.txt
    echo "pool status: $(dmsetup status pool)" >>about.txt
    grow=
}

pool_table() {
    echo "0 $data_sectors thin-pool /dev/nullb0 /dev/mapper/data $block $low $features"
}

# thin NAME ID SECTORS [ORIGIN]: makes the dm device NAME, which is thin device ID
thin() {
    dmsetup create $1 --table "0 $3 thin /dev/mapper/pool $2 ${4-}"
    thins="${thins-} $1"
}

# The trace's name of a dm device.
number() {
    dmsetup info -c --noheadings -o major,minor $1
}

# Records the thin devices there are; messages go to the first.
record() {
    devices=
    for t in $thins; do
        devices="$devices -d /dev/mapper/$t"
        n=$(number $t)
        q=/sys/dev/block/$n/queue
        echo "$t: $n, $(dmsetup table $t), max_sectors_kb $(cat $q/max_sectors_kb), max_hw_sectors_kb $(cat $q/max_hw_sectors_kb), discard_max_bytes $(cat $q/discard_max_bytes)" >>about.txt
    done
    first=dm-$(number ${thins# *} | cut -d: -f2)
    set -- $thins
    first=dm-$(number $1 | cut -d: -f2)
    # It maps its files into memory, which 9p does not have.
    blktrace $devices -D /t -b 512 -n 8 >blktrace.txt 2>&1 &
    blktrace=$!
    sleep 1
    for f in schedule_copy schedule_zero process_prepared_mapping dm_thin_insert_block thin_map; do
        echo "p:p_$f $f" >>$debug/tracing/kprobe_events 2>/dev/null || echo "no probe of $f" >>about.txt
    done
    echo 1 >$debug/tracing/events/kprobes/enable
}

ctl() {
    echo "ctl $*" >$debug/block/$first/msg
}

# A message to the pool, and to the trace.
message() {
    dmsetup message pool 0 "$*"
    ctl "$@"
}

# activate NAME ID SECTORS [ORIGIN_SECTORS]: tells the trace what a device is
activate() {
    ctl activate $(number $1) $2 $3 ${4:-0}
}

# snapshot ID ORIGIN NAME: of the dm device NAME
snapshot() {
    dmsetup suspend $3
    message create_snap $1 $2
    dmsetup resume $3
}

# become NAME ID SECTORS [ORIGIN]: the dm device is another thin device from here on
become() {
    dmsetup suspend $1
    dmsetup load $1 --table "0 $3 thin /dev/mapper/pool $2 ${4-}"
    dmsetup resume $1
    ctl deactivate $(number $1)
}

mark() {
    sync
    dmsetup message pool 0 reserve_metadata_snap
    thin_dump -m /dev/nullb0 >phase-$1.xml
    dmsetup message pool 0 release_metadata_snap
    dmsetup status pool >status-$1.txt
    for t in $thins; do dmsetup status $t >>status-$1.txt; done
    awk '{ print $1, $2 }' $debug/tracing/kprobe_profile >counts-$1.txt
    ctl phase-end $1
}

finish() {
    kill -INT $blktrace
    wait $blktrace || true
    cp /t/*.blktrace.* .
    for t in $thins; do dmsetup remove $t; done
    dmsetup remove pool
    dmsetup remove data
    thin_check /dev/nullb0
    cat blktrace.txt
    rm blktrace.txt
}

# put NAME SECTOR SECTORS: one write
put() {
    dd if=/dev/urandom of=/t/data bs=512 count=$3 2>/dev/null
    dd if=/t/data of=/dev/mapper/$1 bs=$(($3 * 512)) seek=$(($2 * 512)) oflag=direct,seek_bytes count=1 conv=notrunc 2>/dev/null
}

# get NAME SECTOR SECTORS: one read
get() {
    dd if=/dev/mapper/$1 of=/dev/null bs=$(($3 * 512)) skip=$(($2 * 512)) iflag=direct,skip_bytes count=1 2>/dev/null
}

# trim NAME SECTOR SECTORS
trim() {
    blkdiscard -o $(($2 * 512)) -l $(($3 * 512)) /dev/mapper/$1
}

# load NAME ARGUMENTS: fio, in direct I/O with several requests under way
load() {
    name=$1
    shift
    fio --name=$name --filename=/dev/mapper/$name --ioengine=libaio --direct=1 --iodepth=8 --randseed=1 --norandommap "$@" >>fio.txt 2>&1 ||
        { cat fio.txt; exit 1; }
    rm -f fio.txt
}

case $case in
snapshots)
    # A snapshot of a snapshot, all of them written to; ids and device numbers that become something else.
    pool 4 524288 128 16
    dmsetup message pool 0 "create_thin 0"
    thin a 0 131072
    dmsetup message pool 0 "create_thin 7"
    thin b 7 131072
    thin c 7 131072
    record
    # The device comes before the message that makes it.
    activate a 0 131072
    ctl create_thin 0
    ctl create_thin 7
    activate b 7 131072
    activate c 7 131072
    load a --rw=randwrite --bsrange=4k-64k --io_size=6m --size=32m
    load b --rw=randwrite --bs=4k --io_size=512k --size=32m
    mark one
    snapshot 1 0 a
    become b 1 131072
    activate b 1 131072
    load b --rw=randwrite --bs=4k --io_size=1m --size=32m
    snapshot 2 1 b
    become c 2 131072
    activate c 2 131072
    for t in a b c; do load $t --rw=randrw --bsrange=4k-64k --io_size=2m --size=48m & done
    wait_for_loads() { for j in $(jobs -p); do [ $j = $blktrace ] || wait $j; done; }
    wait_for_loads
    mark two
    # The middle of the chain goes, its id comes back as a snapshot of its own snapshot, and under another device.
    become b 0 131072
    message delete 1
    activate b 0 131072
    snapshot 1 2 c
    become a 1 131072
    activate a 1 131072
    message delete 7
    load a --rw=randwrite --bs=4k --io_size=1m --size=48m
    load c --rw=randwrite --bs=64k --io_size=2m --size=48m
    mark three
    # The device that was the origin once more becomes a new thin device of a used id.
    become b 2 131072
    message delete 0
    message create_thin 0
    become c 0 131072
    activate b 2 131072
    activate c 0 131072
    load c --rw=randwrite --bs=16k --io_size=1m --size=48m
    trim b 4096 20000
    load b --rw=randrw --bs=4k --io_size=1m --size=48m --fsync=32
    mark four
    finish
    ;;
space-queue)
    # 64 blocks. Writes wait for space, which a discard, a deletion and growth bring.
    pool 4 8192 128 8
    dmsetup message pool 0 "create_thin 0"
    dmsetup message pool 0 "create_thin 1"
    thin a 0 32768
    thin b 1 32768
    record
    ctl create_thin 0
    ctl create_thin 1
    activate a 0 32768
    activate b 1 32768
    i=0
    while [ $i -lt 60 ]; do put a $((i * 128)) 8; i=$((i + 1)); done
    mark filled
    # These need six blocks, and there are four.
    (i=60; while [ $i -lt 66 ]; do put a $((i * 128)) 128; i=$((i + 1)); done) &
    waits=$!
    sleep 3
    mark waits
    # The kernel may well commit between the unmapping and the end of the discard of the data device, which frees the blocks. Nothing
    # has changed then that it would commit by itself, and the writes go on waiting.
    trim a 0 1024
    sleep 2
    message set_transaction_id 0 0
    wait $waits
    mark discarded
    (i=0; while [ $i -lt 10 ]; do put b $((i * 256)) 8; i=$((i + 1)); done) &
    waits=$!
    sleep 3
    mark waits-again
    trim a 1024 1024
    sleep 2
    message set_transaction_id 0 0
    wait $waits
    mark discarded-again
    # What a discard does not free: shared blocks. Then their snapshot goes.
    snapshot 2 1 b
    trim b 0 2560
    sleep 2
    mark shared
    (i=0; while [ $i -lt 8 ]; do put a $((16384 + i * 128)) 8; i=$((i + 1)); done) &
    waits=$!
    sleep 3
    mark waits-for-deletion
    message delete 2
    wait $waits
    sleep 2
    mark deleted
    (i=0; while [ $i -lt 24 ]; do put b $((i * 128)) 8; i=$((i + 1)); done) &
    waits=$!
    sleep 3
    mark waits-for-growth
    data_sectors=16384
    dmsetup suspend data
    dmsetup load data --table "0 16384 linear /dev/nullb1 0"
    dmsetup resume data
    dmsetup load pool --table "$(pool_table)"
    dmsetup suspend pool
    ctl suspend
    ctl resize 16384
    ctl resume
    dmsetup resume pool
    wait $waits
    mark grown
    finish
    ;;
space-error)
    # The same with error_if_no_space: what needs a block fails.
    pool 4 4096 128 4 error_if_no_space
    dmsetup message pool 0 "create_thin 0"
    thin a 0 32768
    record
    ctl create_thin 0
    activate a 0 32768
    i=0
    while [ $i -lt 36 ]; do put a $((i * 128)) 8 || true; i=$((i + 1)); done
    mark full
    put a 0 8
    put a 8192 8 || true
    mark still-full
    # A pool that is resumed is in write mode until something needs a block.
    dmsetup suspend pool
    ctl suspend
    ctl resume
    dmsetup resume pool
    mark resumed
    put a 8192 8 || true
    mark full-again
    trim a 0 384
    sleep 2
    mark discarded
    put a 8192 8
    put a 8320 64
    put a 8448 128
    put a 8576 8 || true
    mark full-once-more
    data_sectors=6144
    dmsetup suspend data
    dmsetup load data --table "0 6144 linear /dev/nullb1 0"
    dmsetup resume data
    dmsetup load pool --table "$(pool_table)"
    dmsetup suspend pool
    ctl suspend
    ctl resize 6144
    ctl resume
    dmsetup resume pool
    put a 8576 8
    mark grown
    finish
    ;;
origin | origin-skip)
    # An external origin of 5 blocks and 40 sectors, under devices that end before, behind and at the same place.
    skip=
    [ $case = origin ] || skip=skip_block_zeroing
    pool 4 131072 128 16 $skip
    null_blk nullb2 1 512 0
    dmsetup create origin --table "0 680 linear /dev/nullb2 0"
    for id in 0 1 2 3; do dmsetup message pool 0 "create_thin $id"; done
    thin longer 0 1304 /dev/mapper/origin
    thin shorter 1 300 /dev/mapper/origin
    thin equal 2 680 /dev/mapper/origin
    thin whole 3 1304 /dev/mapper/origin
    record
    for id in 0 1 2 3; do ctl create_thin $id; done
    activate longer 0 1304 680
    activate shorter 1 300 680
    activate equal 2 680 680
    activate whole 3 1304 680
    for at in 0 128 256 384 512 640 768 896 1024 1152; do get longer $at 128; done
    get longer 1280 24
    get longer 600 200
    get shorter 256 44
    get equal 640 40
    mark read
    put longer 136 8
    put longer 644 8
    put longer 700 8
    put longer 900 8
    put longer 1284 8
    put shorter 0 8
    put shorter 256 44
    put equal 640 40
    put equal 16 8
    put whole 0 128
    put whole 640 128
    put whole 768 128
    put whole 1280 24
    mark written
    get longer 640 128
    get longer 128 300
    trim longer 0 1304
    trim shorter 0 300
    trim equal 640 40
    trim whole 640 664
    sleep 2
    mark discarded
    get longer 640 200
    put longer 640 40
    put longer 512 128
    put whole 639 130
    put whole 600 300
    put shorter 100 60
    snapshot 4 3 whole
    put whole 1280 24
    put whole 640 128
    put whole 0 8
    mark again
    finish
    ;;
large-*)
    # Blocks of 192 KiB, requests larger than that, cut at the device's max_sectors.
    [ $case = large-default ] || most=$((${case#large-} * 2))
    pool 4 196608 384 16
    dmsetup message pool 0 "create_thin 0"
    thin a 0 262144
    record
    ctl create_thin 0
    activate a 0 262144
    put a 0 1536
    put a 8192 2048
    put a 16640 1000
    put a 30720 384
    mark few
    load a --rw=randwrite --bsrange=4k-1m --blockalign=4k --io_size=24m --size=96m
    mark written
    snapshot 1 0 a
    load a --rw=randwrite --bsrange=4k-1m --blockalign=4k --io_size=12m --size=96m
    trim a 1000 60000
    trim a 100001 3001
    sleep 2
    mark snapshot
    finish
    ;;
no-passdown | ignore)
    # Discards that are not passed down, or not taken at all.
    [ $case = ignore ] && word=ignore_discard || word=no_discard_passdown
    pool 4 131072 128 16 $word
    dmsetup message pool 0 "create_thin 0"
    thin a 0 131072
    record
    ctl create_thin 0
    activate a 0 131072
    load a --rw=randwrite --bs=16k --io_size=4m --size=32m
    trim a 0 1000 || true
    mark trimmed
    snapshot 1 0 a
    trim a 1000 30000 || true
    load a --rw=randwrite --bs=4k --io_size=1m --size=32m
    trim a 20000 30000 || true
    mark trimmed-again
    message delete 1
    load a --rw=randwrite --bs=4k --io_size=1m --size=32m
    trim a 0 20000 || true
    mark deleted
    finish
    ;;
together)
    # Three devices at once on two processors, with flushes and discards between the writes.
    pool 4 524288 128 64
    for id in 0 1 2; do dmsetup message pool 0 "create_thin $id"; done
    thin a 0 131072
    thin b 1 131072
    thin c 2 131072
    record
    for id in 0 1 2; do ctl create_thin $id; done
    activate a 0 131072
    activate b 1 131072
    activate c 2 131072
    wait_for_loads() { for j in $(jobs -p); do [ $j = $blktrace ] || wait $j; done; }
    load a --rw=randrw --bs=4k --io_size=3m --size=48m --numjobs=2 &
    load b --rw=randwrite --bsrange=4k-128k --io_size=5m --size=48m --fsync=16 &
    load c --rw=randtrimwrite --bs=64k --io_size=6m --size=48m &
    wait_for_loads
    mark one
    snapshot 10 0 a
    snapshot 11 1 b
    load a --rw=randwrite --bs=4k --io_size=2m --size=48m --numjobs=2 --fsync=64 &
    load b --rw=randtrimwrite --bs=64k --io_size=5m --size=48m &
    load c --rw=randrw --bs=8k --io_size=2m --size=48m &
    wait_for_loads
    sleep 2
    mark two
    message delete 10
    load a --rw=randtrimwrite --bs=64k --io_size=4m --size=48m &
    load b --rw=randwrite --bs=4k --io_size=1m --size=48m &
    wait_for_loads
    sleep 2
    mark three
    finish
    ;;
esac
ls -l
