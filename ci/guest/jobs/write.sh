# shellcheck shell=sh disable=SC2154  # SECTORS, QUEUES and SERIAL are given by the test
# The first guest of a test: looks at the disk, then fills it: /dev/vda1 with fio's blocks, /dev/vda2 with files.
# shellcheck source=expect.sh
. /job/expect.sh

expect "sectors" "$SECTORS" "$(attribute size)"
expect "serial" "$SERIAL" "$(attribute serial)"
expect "queues" "$QUEUES" "$(queue_count)"
expect "read-only" 0 "$(attribute ro)"
expect "logical block size" 512 "$(attribute queue/logical_block_size)"
expect "cache" "write back" "$(attribute queue/write_cache)"

echo "size=260MiB, type=linux
type=linux" | sfdisk --quiet --label gpt /dev/vda
VERIFY_ONLY=0 fio --eta=never --minimal --output=/tmp/fio.out /job/blocks.fio || { grep -v "^3;" /tmp/fio.out; exit 1; }

# Each queue has an interrupt of its own; one that never rang was never used.
grep 'virtio[0-9]*-req' /proc/interrupts
rang=$(grep 'virtio[0-9]*-req' /proc/interrupts | awk '{ for (i = 2; i <= 5; i++) if ($i > 0) { n++; break } } END { print n + 0 }')
expect "queues in use" "$QUEUES" "$rang"

mkfs.ext4 -q /dev/vda2
mount -t ext4 /dev/vda2 /mnt
mkdir /mnt/tree
for i in 1 2 3 4 5 6 7 8; do
    head -c $((i * 1048576 + i * 4099)) /dev/urandom >/mnt/tree/file-$i
    ln -s file-$i /mnt/tree/link-$i
done
(cd /mnt/tree && sha256sum file-* >/mnt/SHA256SUMS)
umount /mnt
e2fsck -f -n /dev/vda2
