# shellcheck shell=sh disable=SC2154  # CAN_CHANGE is given by the test
# The guest may choose between write back and write through, if the front end lets it.
# shellcheck source=expect.sh
. /job/expect.sh

expect "cache at first" "write back" "$(attribute queue/write_cache)"
if [ "$CAN_CHANGE" = no ]; then
    if (echo "write through" >/sys/block/vda/cache_type) 2>/dev/null; then
        echo "the cache could be changed"
        exit 1
    fi
    expect "cache as before" "write back" "$(attribute cache_type)"
    exit 0
fi
for mode in "write through" "write back" "write through" "write back"; do
    echo "$mode" >/sys/block/vda/cache_type
    expect "cache as chosen" "$mode" "$(attribute cache_type)"
    dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null
    dd if=/tmp/data of=/dev/vda bs=64k oflag=direct conv=fsync 2>/dev/null
    blockdev --flushbufs /dev/vda
    dd if=/dev/vda bs=64k count=64 iflag=direct 2>/dev/null | cmp - /tmp/data
done
