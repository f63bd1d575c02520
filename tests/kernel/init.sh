#!/bin/busybox sh
# PID 1 of the guest that tests/kernel.rs boots: runs every check_* function below in a shell of its
# own and reports each on the console, as "check NAME passed" or "check NAME failed" followed by what
# it printed, each line after a "| ". Ends by resetting the machine.

check_file_systems() {
  for name in overlay ext2 ext4 erofs tmpfs fuse virtiofs proc sysfs cgroup2 devtmpfs devpts mqueue \
    hugetlbfs binfmt_misc bpf securityfs; do
    grep -qw "$name" /proc/filesystems || { echo "no file system $name"; return 1; }
  done
  refuse grep -E 'xfs|btrfs|vfat|iso9660|debugfs|tracefs' /proc/filesystems
}

check_overlay() {
  mkdir lower upper work merged
  echo one >lower/changed
  echo two >lower/removed
  mkdir lower/opaque
  echo hidden >lower/opaque/hidden
  mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged
  echo more >>merged/changed
  rm merged/removed
  rm -r merged/opaque
  mkdir merged/opaque
  [ "$(cat lower/changed)" = one ]
  [ "$(cat upper/changed)" = "$(printf 'one\nmore')" ]
  [ -c upper/removed ]
  [ "$(getfattr --only-values -n trusted.overlay.opaque upper/opaque)" = y ]
  umount merged
}

check_ext4_through_loop() {
  truncate -s 16M image
  mke2fs -q -t ext4 image
  mkdir disk
  mount -o loop,user_xattr,acl image disk
  echo data >disk/file
  setfattr -n user.kiln -v value disk/file
  setfacl -m u:1234:r disk/file
  umount disk
  mount -o loop,ro image disk
  [ "$(cat disk/file)" = data ]
  [ "$(getfattr --only-values -n user.kiln disk/file)" = value ]
  getfacl -n disk/file | grep -q '^user:1234:r--$'
  umount disk
}

# The block device is an LZ4-compressed image that the test made on the host.
check_erofs_on_virtio_blk() {
  mkdir image
  mount -t erofs -o ro /dev/vda image
  [ "$(sha256sum <image/compressible)" = "$(cat /expected/compressible.sha256)" ]
  [ "$(cat image/directory/small)" = small ]
  refuse touch image/new
  umount image
}

check_tmpfs() {
  mount -t tmpfs -o size=1m tmpfs .
  cd "$PWD"
  echo data >file
  setfattr -n user.kiln -v value file
  setfattr -n trusted.kiln -v value file
  [ "$(getfattr --only-values -n user.kiln file)" = value ]
  setfacl -m g:1234:rw file
  getfacl -n file | grep -q '^group:1234:rw-$'
  refuse dd if=/dev/zero of=big bs=1M count=2
}

check_posix_locks_and_pipes() {
  touch locked
  flock locked true
  mkfifo pipe
  echo through >pipe &
  [ "$(cat pipe)" = through ]
}

check_cgroup_controllers() {
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
  for name in cpuset cpu io memory hugetlb pids rdma misc; do
    grep -qw "$name" /sys/fs/cgroup/cgroup.controllers || { echo "no controller $name"; return 1; }
    echo "+$name" >/sys/fs/cgroup/cgroup.subtree_control
  done
  mkdir /sys/fs/cgroup/step
  cd /sys/fs/cgroup/step
  for file in cpu.max cpu.weight cpu.pressure cpuset.cpus memory.max memory.high memory.swap.max \
    memory.oom.group memory.events pids.max io.max io.weight io.latency hugetlb.2MB.max misc.max \
    rdma.max cgroup.freeze cgroup.kill; do
    [ -e "$file" ] || { echo "no $file"; return 1; }
  done
}

check_cgroup_limits() {
  cd /sys/fs/cgroup/step
  echo 50000 100000 >cpu.max
  echo 16M >memory.max
  echo 1 >memory.oom.group
  # tail keeps a line whole: one without an end takes memory until the limit is met.
  sh -c 'echo $$ >cgroup.procs; exec tail -n 1 /dev/zero' && return 1
  grep -q '^oom_group_kill 1$' memory.events
  grep -q '^nr_periods [1-9]' cpu.stat
  echo 2 >pids.max
  sh -c 'echo $$ >cgroup.procs; sleep 0 & sleep 0 & sleep 0 & wait' || true
  grep -q '^max [1-9]' pids.events
}

check_namespaces() {
  for name in cgroup ipc mnt net pid time user uts; do
    [ -e "/proc/self/ns/$name" ] || { echo "no $name namespace"; return 1; }
  done
  # As an unprivileged user, who becomes root of all the new ones.
  [ "$(setpriv --reuid 1000 --clear-groups \
    unshare --user --map-root-user --mount --uts --ipc --net --pid --cgroup --time --fork \
    sh -c 'mount -t tmpfs tmpfs /tmp && hostname inner && echo "$(id -u) $$ $(hostname)"')" = "0 1 inner" ]
  refuse [ "$(hostname)" = inner ]
}

check_seccomp() {
  for action in kill_process kill_thread trap errno user_notif trace log allow; do
    grep -qw "$action" /proc/sys/kernel/seccomp/actions_avail || { echo "no action $action"; return 1; }
  done
}

check_binfmt_misc() {
  mkdir -p /proc/sys/fs/binfmt_misc
  mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
  printf '#!/bin/busybox sh\necho "interpreted $1"\n' >/interpreter
  chmod 755 /interpreter
  printf 'KILNTEST' >program
  chmod 755 program
  echo ':kiln:M::KILNTEST::/interpreter:' >/proc/sys/fs/binfmt_misc/register
  ./program | grep -q '^interpreted ./program$'
}

check_nftables() {
  nft -f - <<EOF
table inet filter {
  set blocked { type ipv4_addr; flags interval; elements = { 10.0.0.0/8 } }
  chain forward {
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    ip daddr @blocked counter reject with icmpx admin-prohibited
    limit rate 10/second log prefix "step " accept
    fib daddr type local tcp dport { 80, 443 } accept
  }
}
table ip nat {
  chain post { type nat hook postrouting priority srcnat; oifname "eth0" masquerade; }
  chain pre { type nat hook prerouting priority dstnat; tcp dport 8080 dnat to 10.1.1.2:80; }
  chain out { type nat hook output priority -100; udp dport 53 redirect to :5353; }
}
table ip6 nat {
  chain post { type nat hook postrouting priority srcnat; masquerade; }
}
table bridge filter {
  chain forward { type filter hook forward priority 0; ether type arp accept; }
}
table netdev early {
  chain in { type filter hook ingress device lo priority 0; meta mark 7 drop; }
}
EOF
  for table in 'inet filter' 'ip nat' 'ip6 nat' 'bridge filter' 'netdev early'; do
    nft list tables | grep -q "^table $table\$" || { echo "no table $table"; return 1; }
  done
  nft flush ruleset
}

# A namespace behind a bridge reaches another through nftables' masquerading.
check_veth_bridge_and_masquerade() {
  ip netns add inside
  ip netns add outside
  ip link add bridge0 type bridge
  ip link add in0 type veth peer name eth0 netns inside
  ip link add out0 type veth peer name eth0 netns outside
  ip link set in0 master bridge0
  ip address add 10.1.1.1/24 dev bridge0
  ip address add 10.2.2.1/24 dev out0
  for link in bridge0 in0 out0; do ip link set "$link" up; done
  ip -n inside address add 10.1.1.2/24 dev eth0
  ip -n inside link set eth0 up
  ip -n inside route add default via 10.1.1.1
  ip -n outside address add 10.2.2.2/24 dev eth0
  ip -n outside link set eth0 up
  echo 1 >/proc/sys/net/ipv4/ip_forward
  # Without masquerading the answer finds no way back: outside has no default route.
  nft 'table ip nat { chain post { type nat hook postrouting priority srcnat; oifname "out0" masquerade; }; }'
  ip netns exec inside ping -c 1 -w 20 10.2.2.2
  ip netns exec inside arping -c 1 -w 20 -I eth0 10.1.1.1
  nft flush ruleset
  ip netns del inside
  ip netns del outside
  ip link del bridge0
}

check_ipv6() {
  ip link set lo up
  ping6 -c 1 -w 20 ::1
}

check_tun_and_tap() {
  ip tuntap add dev tun0 mode tun
  ip tuntap add dev tap0 mode tap
  ip link show tun0
  ip link show tap0
  ip link del tun0
  ip link del tap0
}

check_watch_and_ipc_knobs() {
  for file in /proc/sys/fs/fanotify/max_user_marks /proc/sys/fs/inotify/max_user_watches \
    /proc/sys/fs/mqueue/msg_max /proc/sys/kernel/shmmax /proc/sys/fs/aio-max-nr /proc/sys/kernel/keys; do
    [ -e "$file" ] || { echo "no $file"; return 1; }
  done
}

check_devices() {
  for device in fuse net/tun loop-control vsock hvc0 ttyS0 ptmx vda vdb; do
    [ -c "/dev/$device" ] || [ -b "/dev/$device" ] || { echo "no /dev/$device"; return 1; }
  done
  [ "$(cat /sys/class/misc/hw_random/rng_current)" = virtio_rng.0 ]
  [ "$(dd if=/dev/hwrng bs=16 count=1 2>/dev/null | wc -c)" = 16 ]
  [ -d /sys/class/net/eth0 ]
  ls -d /sys/bus/virtio/drivers/virtio_balloon/virtio*
  [ -d /sys/bus/virtio/drivers/virtiofs ]
  [ "$(nproc)" = 2 ]
}

check_virtio_blk_writes() {
  echo "written in the guest" | dd of=/dev/vdb bs=512 conv=sync,fsync
}

# What was left out, by its traces.
check_absent() {
  for path in /dev/mem /dev/port /proc/kcore /proc/modules /proc/sysrq-trigger \
    /proc/acpi /sys/bus/pci /sys/bus/usb /sys/firmware/acpi /dev/tty1 /dev/input /sys/kernel/debug \
    /proc/sys/kernel/io_uring_disabled /sys/kernel/kexec_loaded /sys/module/i8042; do
    [ ! -e "$path" ] || { echo "there is $path"; return 1; }
  done
}

check_hardening() {
  for pair in kernel/kptr_restrict:2 kernel/dmesg_restrict:1 kernel/unprivileged_bpf_disabled:2 \
    kernel/yama/ptrace_scope:1 net/core/bpf_jit_enable:1 dev/tty/ldisc_autoload:0 \
    vm/mmap_min_addr:65536 kernel/randomize_va_space:2; do
    [ "$(cat "/proc/sys/${pair%:*}")" = "${pair#*:}" ] || { echo "$pair: $(cat "/proc/sys/${pair%:*}")"; return 1; }
  done
  [ ! -e /proc/sys/dev/tty/legacy_tiocsti ] || [ "$(cat /proc/sys/dev/tty/legacy_tiocsti)" = 0 ]
  mount -t securityfs securityfs /sys/kernel/security
  [ "$(cat /sys/kernel/security/lsm)" = capability,landlock,yama ]
  refuse setpriv --reuid 1000 --clear-groups dmesg
  # Every function's address reads as zero.
  refuse grep -v '^0000000000000000 ' /proc/kallsyms
  dmesg | grep -q 'mem auto-init: stack:all(zero), heap alloc:on'
  refuse grep -r 'Vulnerable' /sys/devices/system/cpu/vulnerabilities
}

# ------------------------------------------------------------------------------------------------

# True if the command fails.
refuse() {
  if "$@"; then
    echo "should have failed: $*"
    return 1
  fi
}

/bin/busybox --install -s /bin
export PATH=/usr/bin:/bin
# This busybox takes its own applets before what is in PATH.
for program in ip unshare setpriv flock mke2fs setfattr getfattr setfacl getfacl; do
  eval "$program() { /usr/bin/$program \"\$@\"; }"
done
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /tmp /run
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
chmod 1777 /tmp

echo "release $(uname -r)"
echo "config begins"
zcat /proc/config.gz | grep '^CONFIG_'
echo "config ends"
for check in $(sed -n 's/^\(check_[a-z0-9_]*\)() {$/\1/p' /init); do
  mkdir "/tmp/$check"
  # -e must hold inside the function: no condition around it.
  (cd "/tmp/$check" && set -e && "$check") >/tmp/output 2>&1 </dev/null
  if [ "$?" = 0 ]; then
    echo "check ${check#check_} passed"
  else
    echo "check ${check#check_} failed"
    sed 's/^/| /' /tmp/output
  fi
done
echo "checks ended"
reboot -f
