# shellcheck shell=sh
# The second guest of a test: finds all that the first one left.
# shellcheck source=expect.sh
. /job/expect.sh

e2fsck -f -n /dev/vda2
mount -t ext4 -o ro /dev/vda2 /mnt
cd /mnt/tree
sha256sum -c ../SHA256SUMS
for i in 1 2 3 4 5 6 7 8; do
    expect "link-$i" "file-$i" "$(readlink link-$i)"
done
cd /
umount /mnt
VERIFY_ONLY=1 fio --eta=never --minimal --output=/tmp/fio.out /job/blocks.fio || { grep -v "^3;" /tmp/fio.out; exit 1; }
