# shellcheck shell=sh
# Reads one sector after the other while the host upgrades the disk's daemon, and tells what the slowest read took.
# shellcheck source=expect.sh
. /job/expect.sh

fio --name=pause --filename=/dev/vda --rw=randread --bs=4k --direct=1 --time_based --runtime=15 --minimal >/tmp/fio.out
# Fields 5 and 39 of fio's terse line: whether there was an error, and the longest read in microseconds.
expect "error" 0 "$(cut -d ';' -f 5 /tmp/fio.out)"
echo "slowest read: $(cut -d ';' -f 39 /tmp/fio.out) us"
