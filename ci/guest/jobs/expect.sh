# shellcheck shell=sh
# What the jobs of the tests share. Sourced by them as /job/expect.sh.
set -e

# Ends the job unless $1, which is $3, is $2.
expect() {
    if [ "$2" != "$3" ]; then
        echo "$1: expected '$2', found '$3'"
        exit 1
    fi
    echo "$1: $3"
}

attribute() {
    cat "/sys/block/vda/$1"
}

queue_count() {
    find /sys/block/vda/mq -mindepth 1 -maxdepth 1 | wc -l
}
