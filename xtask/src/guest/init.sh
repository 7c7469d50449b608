#!/bin/busybox sh
# First stage, from the initramfs: a root file system that is the machine's own, seen
# over 9p, with a tmpfs above it that takes the writes.
/bin/busybox mkdir -p /bin /dev /proc /sys /ctl /lower /rw /new
/bin/busybox --install -s /bin
export PATH=/bin

fail() {
    echo "guest init: $*" >/dev/console
    [ -e /ctl/run.sh ] && echo "$*" >/ctl/init-error
    poweroff -f
}

mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys

for module in $(cat /modules/order); do
    insmod "/modules/$module" || fail "cannot load $module"
done

NINEP=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o $NINEP,cache=none ctl /ctl || fail "cannot mount the control directory"
# The machine does not change under a run as far as the run is concerned, and caching is
# what makes reading libraries and test binaries bearable under emulation.
mount -t 9p -o $NINEP,ro,cache=loose root /lower || fail "cannot mount the machine's root"
mount -t tmpfs -o mode=755,size=75% rw /rw
mkdir /rw/up /rw/work
mount -t overlay -o lowerdir=/lower,upperdir=/rw/up,workdir=/rw/work overlay /new ||
    fail "cannot mount the overlay"

mount --move /dev /new/dev
mount --move /proc /new/proc
mount --move /sys /new/sys
mount -t tmpfs -o mode=755 run /new/run
mkdir /new/run/proxy-vm
mount --move /ctl /new/run/proxy-vm
exec switch_root /new /bin/sh /run/proxy-vm/boot.sh
