# shellcheck shell=sh
# Fills a good part of the disk with a file, beside one that is to stay, deletes it and gives its space back.
set -e
mkfs.ext4 -q /dev/vda
mount -t ext4 /dev/vda /mnt
head -c 5000000 /dev/urandom >/mnt/file
sha256sum </mnt/file >/mnt/SHA256SUM
head -c 1048576 /dev/urandom >/tmp/mib
for _ in $(seq 300); do cat /tmp/mib; done >/mnt/large
sync
rm /mnt/large
sync
fstrim -v /mnt
sha256sum </mnt/file | cmp - /mnt/SHA256SUM
umount /mnt
