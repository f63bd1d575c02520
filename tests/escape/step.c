/* A step that reaches for what isn't its own: the agent, the kernel's log, devices, the guest's kernel.
 * It prints a line for each attempt: "NAME: refused", or "NAME: OPEN" for one that the kernel let pass.
 * CONTROL_PORT and STREAM_PORT are the agent's (-D). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/io.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

static void attempt(const char *name, int open)
{
	printf("%s: %s\n", name, open ? "OPEN" : "refused");
}

/* Whether somebody takes a connection and keeps it. */
static int dial(unsigned cid, unsigned port)
{
	struct sockaddr_vm to = {.svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port};
	struct timeval patience = {.tv_sec = 2};
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0), kept = 0;
	char byte;
	if (fd < 0)
		return 0;
	setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &patience, sizeof patience);
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	if (connect(fd, (struct sockaddr *)&to, sizeof to) == 0) {
		/* What the agent doesn't want it closes at once. */
		ssize_t got = send(fd, "{\"garbage\":", 11, MSG_NOSIGNAL) < 0 ? 0 : read(fd, &byte, 1);
		kept = got > 0 || (got < 0 && errno == EAGAIN);
	}
	close(fd);
	return kept;
}

static int take_port(unsigned port)
{
	struct sockaddr_vm at = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
	int taken = fd >= 0 && bind(fd, (struct sockaddr *)&at, sizeof at) == 0 && listen(fd, 1) == 0;
	close(fd);
	return taken;
}

static int opens(const char *path, int flags)
{
	int fd = open(path, flags | O_NONBLOCK);
	if (fd >= 0)
		close(fd);
	return fd >= 0;
}

/* Makes a device node and opens it. */
static int device(mode_t kind, unsigned major, unsigned minor)
{
	int opened;
	unlink("/tmp/node");
	if (mknod("/tmp/node", kind | 0600, makedev(major, minor)) != 0)
		return 0;
	opened = opens("/tmp/node", O_RDONLY) || opens("/tmp/node", O_WRONLY);
	unlink("/tmp/node");
	return opened;
}

/* In a user namespace a process has every capability, though over that only. */
static int in_a_user_namespace(int (*act)(void))
{
	int status;
	pid_t child = fork();
	if (child == 0)
		_exit(unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0 && act());
	waitpid(child, &status, 0);
	return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}

static int share(void)
{
	return mount("kiln", "/tmp", "virtiofs", 0, NULL) == 0;
}

static int log_is_cleared(void)
{
	return klogctl(5, NULL, 0) == 0;
}

int main(void)
{
	static char page[4096];
	struct timeval now;
	unsigned port;
	int any = 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	mkdir("/tmp", 0777);
	attempt("the agent's connection to the host", dial(VMADDR_CID_HOST, CONTROL_PORT));
	for (port = 1; port < 64; port++)
		any |= dial(VMADDR_CID_HOST, port);
	attempt("another port of the host", any | dial(VMADDR_CID_HOST, STREAM_PORT));
	attempt("the agent's port", dial(VMADDR_CID_LOCAL, STREAM_PORT));
	attempt("the agent's port, by the guest's number", dial(3, STREAM_PORT));
	attempt("the agent's port for oneself", take_port(STREAM_PORT));
	/* The container's first process is this one, and there is no other. */
	attempt("other processes", getpid() != 1 || kill(-1, 0) == 0);
	attempt("the kernel's log", klogctl(3, page, sizeof page) > 0);
	attempt("the kernel's log, cleared", log_is_cleared());
	attempt("the kernel's log, as a user namespace's root", in_a_user_namespace(log_is_cleared));
	attempt("/dev/kmsg", opens("/dev/kmsg", O_RDONLY) || device(S_IFCHR, 1, 11));
	attempt("/dev/mem", device(S_IFCHR, 1, 1));
	attempt("/dev/port", device(S_IFCHR, 1, 4));
	attempt("the console", device(S_IFCHR, 5, 1) || device(S_IFCHR, 4, 64));
	attempt("a disk", device(S_IFBLK, 254, 0) || device(S_IFBLK, 253, 0));
	attempt("a loop device", device(S_IFBLK, 7, 0) || device(S_IFCHR, 10, 237));
	attempt("the file systems' device", device(S_IFCHR, 10, 229));
	attempt("the network's device", device(S_IFCHR, 10, 200));
	/* Making nodes is allowed: it isn't that which keeps the others closed. */
	attempt("a node of its own for null, not to be had", !device(S_IFCHR, 1, 3));
	attempt("the share once more", share());
	attempt("the share, as a user namespace's root", in_a_user_namespace(share));
	attempt("a mount", mount("tmpfs", "/tmp", "tmpfs", 0, NULL) == 0);
	attempt("/proc/kcore", opens("/proc/kcore", O_RDONLY));
	attempt("/proc/sysrq-trigger", opens("/proc/sysrq-trigger", O_WRONLY));
	attempt("/proc/sys", opens("/proc/sys/kernel/core_pattern", O_WRONLY));
	attempt("a kernel module", syscall(SYS_init_module, page, sizeof page, "") == 0);
	attempt("another kernel", syscall(SYS_kexec_load, 0, 0, NULL, 0) == 0);
	attempt("BPF", syscall(SYS_bpf, 0, page, 64) >= 0);
	memset(page, 0, sizeof page);
	attempt("performance events", syscall(SYS_perf_event_open, page, -1, 0, -1, 0) >= 0);
	attempt("io_uring", syscall(SYS_io_uring_setup, 1, page) >= 0);
	attempt("I/O ports", iopl(3) == 0);
	gettimeofday(&now, NULL);
	attempt("the clock", settimeofday(&now, NULL) == 0);
	attempt("swap", swapon("/tmp", 0) == 0);
	attempt("a reboot", reboot(RB_DISABLE_CAD) == 0);
	attempt("the host name", sethostname("x", 1) == 0);
	return 0;
}
