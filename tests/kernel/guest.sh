# Runs in the guest. For each disk: activates the pool, reads mapped blocks of some of its devices, breaks sharing, provisions, takes a
# snapshot, makes and deletes devices, and says what went wrong. CASES are the numbers of the disks, in order; /host/N.cfg and
# /host/N.thins say what is expected of each.
i=0
for n in $CASES; do
    disk=/dev/vd$(echo abcdefghijklmnopqrstuvwxyz | cut -c$((i + 1)))
    i=$((i + 1))
    . /host/$n.cfg
    bad=0 reads=0 said=
    wrong() { said="$said; $*"; bad=$((bad + 1)); }
    pool=/dev/mapper/pool$n
    dmsetup create data$n --table "0 $SIZE zero" || wrong data
    if ! dmsetup create pool$n --table "0 $SIZE thin-pool $disk /dev/mapper/data$n $BS 0 1 skip_block_zeroing" 2>/tmp/err; then
        echo "RESULT $n bad=1 reads=0 activation: $(cat /tmp/err)"
        continue
    fi
    echo "STATUS $n $(dmsetup status pool$n)"
    dmsetup status pool$n | grep -q ' rw ' || wrong "not writable"
    first= last=
    while read -r id size sectors blocks; do
        [ -n "$id" ] || continue
        dmsetup create t$n.$id --table "0 $size thin $pool $id" || { wrong "thin $id"; continue; }
        mapped=$(dmsetup status t$n.$id | awk '{print $4}')
        [ "$mapped" = "$sectors" ] || wrong "thin $id has $mapped sectors, not $sectors"
        for b in $(echo $blocks | tr , ' '); do
            dd if=/dev/mapper/t$n.$id of=/dev/null bs=4096 skip=$((b * BS / 8)) count=1 iflag=direct 2>/tmp/err || wrong "read $id $b"
            reads=$((reads + 1))
        done
        [ -n "$first" ] || { first=$id at=$b length=$size; }
        last=$id
    done </host/$n.thins
    put() { dd if=/dev/urandom of=/dev/mapper/$1 bs=4096 seek=$(($2 * BS / 8)) count=1 oflag=direct 2>/tmp/err || wrong "write $1 $2"; }
    message() { dmsetup message pool$n 0 "$*" || wrong "$*"; }
    if [ -n "$first" ]; then
        put t$n.$first $at
        dmsetup suspend t$n.$first
        message create_snap $FRESH $first
        dmsetup resume t$n.$first
        dmsetup create s$n --table "0 $length thin $pool $FRESH" || wrong snapshot
        put s$n $at
        put t$n.$first $at
    fi
    message create_thin 16000001
    dmsetup create n$n --table "0 $((BS * 4)) thin $pool 16000001" || wrong "new thin"
    for b in 0 1 2 3; do put n$n $b; done
    message set_transaction_id $TRANS $((TRANS + 1))
    [ -z "$DEL" ] || message delete $DEL
    if [ "$last" != "$first" ]; then
        dmsetup remove t$n.$last
        message delete $last
    fi
    dmsetup status pool$n | grep -q ' rw .* - ' || wrong "not writable at the end"
    for d in $(dmsetup ls | awk '{print $1}' | grep "^[tsn]$n\(\.\|$\)"); do dmsetup remove $d || wrong "remove $d"; done
    dmsetup remove pool$n || wrong "remove pool"
    dmsetup remove data$n
    echo "RESULT $n bad=$bad reads=$reads $said"
done
