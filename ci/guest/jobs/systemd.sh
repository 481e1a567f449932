# shellcheck shell=sh
# Goes over to the Debian system on /dev/vda, whose systemd runs what a test copied into /job: `tests`, the test program, on the packages
# that are there. Its parts come one after the other, since they are about one machine. With ONLY it is the installation and the tests of these names.
set -e
mount -t ext4 /dev/vda /mnt
mkdir /mnt/job
cp /job/* /mnt/job/
echo "${ONLY:-}" >/mnt/job/only
cat >/mnt/job/parts <<'END'
#!/bin/sh
# No carriage returns: the console is read by programs.
stty -onlcr
read -r up _ </proc/uptime
echo "systemd runs, ${up} s after the start"
result=0
try() { /job/tests --ignored --test-threads=1 --nocapture "$@" 2>&1 || result=1; }
read -r only </job/only
if [ -n "$only" ]; then
    try guest::installed::a_
    # shellcheck disable=SC2086  # names, separated by blanks
    try $only
else
    for part in installed single fleet removed; do try "guest::$part::"; done
fi
read -r up _ </proc/uptime
echo "done, ${up} s after the start"
[ $result = 0 ] || journalctl --no-pager --no-hostname -o short-monotonic -u 'vdi-vhost*' | tail -n 100
echo "GUEST-RESULT: $result"
systemctl poweroff -ff
END
chmod 755 /mnt/job/parts /mnt/job/tests
cat >/mnt/etc/systemd/system/parts.service <<'END'
[Unit]
After=multi-user.target

[Service]
ExecStart=/job/parts
StandardInput=tty
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
END
# Nobody is to log in, and without udev systemd would wait for the console's device.
ln -s /dev/null /mnt/etc/systemd/system/serial-getty@ttyS0.service
mkdir -p /mnt/etc/systemd/system/default.target.wants
ln -s ../parts.service /mnt/etc/systemd/system/default.target.wants/
exec switch_root /mnt /lib/systemd/systemd
