# shellcheck shell=sh
# What the demo's guest does with its empty disk. Every step shows its command; the first that fails ends the job.
set -e

# Shows a command, then runs it; `|` and `>` are left to the caller.
do_() {
    echo "guest# $*"
    "$@"
}

echo "guest: /dev/vda has $(blockdev --getsize64 /dev/vda) bytes, $(find /sys/block/vda/mq -mindepth 1 -maxdepth 1 | wc -l) queues, cache: $(cat /sys/block/vda/queue/write_cache)"

echo "guest# echo 'start=1MiB, type=linux' | sfdisk --label gpt /dev/vda"
echo 'start=1MiB, type=linux' | sfdisk --quiet --label gpt /dev/vda
do_ mkfs.ext4 -q /dev/vda1
do_ mount -t ext4 /dev/vda1 /mnt
do_ cd /mnt

echo "guest: writing a tree: 4 files of 16 MiB, 256 small ones in 32 directories, links, a sparse file"
for i in 1 2 3 4; do
    dd if=/dev/urandom of=big-$i bs=1M count=16 2>/dev/null
done
d=0
while [ $d -lt 32 ]; do
    mkdir -p tree/$((d / 8))/$d
    f=0
    while [ $f -lt 8 ]; do
        head -c $((1 + (d * 8 + f) * 229)) /dev/urandom >tree/$((d / 8))/$d/file-$f
        f=$((f + 1))
    done
    ln -s "../$d/file-0" tree/$((d / 8))/$d/link
    d=$((d + 1))
done
ln big-1 hard-link
dd if=/dev/urandom of=sparse bs=4k count=1 seek=65536 2>/dev/null
echo "guest# find . -type f -print0 | xargs -0 sha256sum > SHA256SUMS"
find . -type f -print0 | xargs -0 sha256sum >/tmp/SHA256SUMS
cp /tmp/SHA256SUMS .
find . | sort | xargs stat -c '%n %F %s' | grep -v SHA256SUMS >/tmp/tree
df -h /mnt | tail -n 1

do_ cd /
do_ sync
do_ umount /mnt
do_ e2fsck -f -n /dev/vda1
# Unmounting emptied the cache of files, this empties the one of the device: what follows comes from the disk.
do_ blockdev --flushbufs /dev/vda
do_ mount -t ext4 /dev/vda1 /mnt
do_ cd /mnt
echo "guest# sha256sum -c SHA256SUMS"
sha256sum -c SHA256SUMS >/tmp/sums
echo "$(grep -c ': OK$' /tmp/sums) files are as they were written"
find . | sort | xargs stat -c '%n %F %s' | grep -v SHA256SUMS | cmp - /tmp/tree
do_ cd /
do_ umount /mnt
