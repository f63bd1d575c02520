#!/bin/busybox sh
# PID 1 of the guest in which a test runs that this machine's own cgroups can't carry: moves to a root
# that can be pivoted away from, and runs the test that the kernel's parameter `kiln_test` names.

if [ -z "$kiln_moved" ]; then
  /bin/busybox --install -s /bin
  export PATH=/bin kiln_moved=1
  mkdir /new
  mount -t tmpfs -o size=75% tmpfs /new
  for entry in bin lib lib64 usr test; do
    [ -e "/$entry" ] && mv "/$entry" /new/
  done
  /new/bin/busybox cp /init /new/init
  /new/bin/busybox mkdir /new/proc /new/sys /new/dev /new/tmp
  exec /new/bin/busybox switch_root /new /init
fi
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
  echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
done
/test --exact "$kiln_test" --nocapture </dev/null 2>&1
echo "test ended: $?"
reboot -f
