# shellcheck shell=sh
# Does what comes over the console, one line after the other, and tells each one's exit code, until it is told to leave.
# Functions and background jobs stay from line to line.
dmesg -n 1
stty -F /dev/ttyS0 -echo
echo "DRIVE-READY"
while read -r line; do
    [ "$line" != leave ] || break
    eval "$line"
    echo "DRIVE-DONE: $?"
done </dev/ttyS0
