# shellcheck shell=sh disable=SC2154  # LOOPS is given by the test
# Writes fio's blocks and reads them again, as often as told, while the host kills the disk's daemon. No request may
# fail, and the driver may notice nothing.
# shellcheck source=expect.sh
. /job/expect.sh

echo "size=260MiB, type=linux" | sfdisk --quiet --label gpt /dev/vda
loop=0
while [ $loop -lt "$LOOPS" ]; do
    VERIFY_ONLY=0 fio --eta=never --minimal --output=/tmp/fio.out /job/blocks.fio || { grep -v "^3;" /tmp/fio.out; exit 1; }
    loop=$((loop + 1))
done
if dmesg | grep -i -e "i/o error" -e "virtio_blk.*id .* is not a head" -e "blocked for more than"; then
    exit 1
fi
expect "cache" "write back" "$(attribute queue/write_cache)"
