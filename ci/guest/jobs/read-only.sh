# shellcheck shell=sh disable=SC2154  # SUM is given by the test
# A guest with a read-only disk: it can read, and nothing it tries writes.
# shellcheck source=expect.sh
. /job/expect.sh

expect "read-only" 1 "$(attribute ro)"
mount -t ext4 -o ro /dev/vda /mnt
expect "content" "$(cat /mnt/SHA256SUM)" "$(sha256sum </mnt/file)"
umount /mnt

if mount -t ext4 -o rw /dev/vda /mnt 2>/dev/null && touch /mnt/new 2>/dev/null; then
    echo "the file system could be written to"
    exit 1
fi
# Linux refuses this by itself, having been told; what the device does with such a request is another test.
if dd if=/dev/urandom of=/dev/vda bs=4k count=1 oflag=direct 2>/tmp/dd.out; then
    echo "the disk could be written to"
    exit 1
fi
cat /tmp/dd.out
