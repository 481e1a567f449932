# shellcheck shell=sh
# Makes a file system with one file on the whole disk.
set -e
mkfs.ext4 -q /dev/vda
mount -t ext4 /dev/vda /mnt
head -c 5000000 /dev/urandom >/mnt/file
sha256sum </mnt/file >/mnt/SHA256SUM
umount /mnt
