# Second stage, with the machine's programs: what a running system has mounted, then the
# command. Written to the control directory, so it changes without a new initramfs.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ctl=/run/proxy-vm

fail() {
    echo "$*" >$ctl/init-error
    busybox poweroff -f
}

mkdir -p /dev/pts /dev/shm /run/lock
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup || fail "cannot mount cgroup2"
mount -t bpf bpf /sys/fs/bpf || fail "cannot mount the BPF file system"
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
for fd in fd:fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do
    ln -sf "/proc/self/${fd#*:}" "/dev/${fd%%:*}"
done

. $ctl/settings
mkdir -p /lib/modules
mount --bind "$VM_MODULES" /lib/modules || fail "cannot mount the kernel's modules"
if [ -n "$VM_OUT" ]; then
    mkdir -p "$VM_OUT"
    mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none out "$VM_OUT" ||
        fail "cannot mount the results directory"
fi
hostname "$VM_HOSTNAME"
ip link set lo up || fail "cannot bring the loopback device up"

# Pipes, so that a program that reopens /dev/stdout appends and does not overwrite.
mkfifo /run/vm-out /run/vm-err
cat </run/vm-out >>$ctl/stdout & out=$!
cat </run/vm-err >>$ctl/stderr & err=$!
echo started >$ctl/started
/bin/sh $ctl/run.sh </dev/null >/run/vm-out 2>/run/vm-err &
wait $!
code=$?

# What the command left running may hold the pipes open; it gets one second.
tries=10
while [ $tries -gt 0 ] && { kill -0 $out || kill -0 $err; } 2>/dev/null; do
    sleep 0.1
    tries=$((tries - 1))
done
echo $code >$ctl/exit.part
mv $ctl/exit.part $ctl/exit
busybox poweroff -f
