# shellcheck shell=sh
# Finds the file of trim.sh and adds one, over a parent: on a file system that was there before.
set -e
e2fsck -f -n /dev/vda
mount -t ext4 /dev/vda /mnt
sha256sum </mnt/file | cmp - /mnt/SHA256SUM
head -c 3000000 /dev/urandom >/mnt/new
sha256sum </mnt/new >/tmp/new
umount /mnt
mount -t ext4 /dev/vda /mnt
sha256sum </mnt/new | cmp - /tmp/new
umount /mnt
e2fsck -f -n /dev/vda
