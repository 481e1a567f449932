# shellcheck shell=sh
# Writes fio's blocks and reads them again, while the host upgrades the disk's daemon. No request may fail, and the driver
# may notice nothing.
# shellcheck source=expect.sh
. /job/expect.sh

echo "size=260MiB, type=linux" | sfdisk --quiet --label gpt /dev/vda
VERIFY_ONLY=0 fio --eta=never --minimal --output=/tmp/fio.out /job/blocks.fio || { grep -v "^3;" /tmp/fio.out; exit 1; }
if dmesg | grep -i -e "i/o error" -e "virtio_blk.*id .* is not a head" -e "blocked for more than"; then
    exit 1
fi
expect "cache" "write back" "$(attribute queue/write_cache)"
