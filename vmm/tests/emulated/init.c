/* PID 1 of the guest of these tests: a server on vsock port 1025. Each connection begins with one
 * byte that says what it does; numbers are little-endian. It is meant to be read beside guest.rs. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/vm_sockets.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

static char buffer[4 << 20];
static volatile uint64_t *last_count; /* shared by all processes */

static void die(const char *what)
{
	perror(what);
	_exit(1);
}

static void get(int fd, void *to, size_t count)
{
	for (char *at = to; count > 0;) {
		ssize_t got = read(fd, at, count);
		if (got <= 0)
			die("read");
		at += got;
		count -= got;
	}
}

static void put(int fd, const void *from, size_t count)
{
	for (const char *at = from; count > 0;) {
		ssize_t done = write(fd, at, count);
		if (done <= 0)
			die("write");
		at += done;
		count -= done;
	}
}

static uint32_t get32(int fd)
{
	uint32_t value;
	get(fd, &value, sizeof value);
	return value;
}

static uint64_t get64(int fd)
{
	uint64_t value;
	get(fd, &value, sizeof value);
	return value;
}

static void put32(int fd, uint32_t value) { put(fd, &value, sizeof value); }
static void put64(int fd, uint64_t value) { put(fd, &value, sizeof value); }

/* The byte at each place of the pattern that is sent and checked. */
static unsigned char pattern(uint64_t at) { return (at * 131) ^ (at >> 9); }

static int dial(uint32_t port)
{
	struct sockaddr_vm to = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port };
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
	if (fd < 0)
		die("socket");
	if (connect(fd, (struct sockaddr *)&to, sizeof to) != 0) {
		int error = errno;
		close(fd);
		errno = error;
		return -1;
	}
	return fd;
}

static void echo(int fd)
{
	for (;;) {
		ssize_t got = read(fd, buffer, sizeof buffer);
		if (got < 0)
			die("echo");
		if (got == 0)
			return;
		put(fd, buffer, got);
	}
}

/* Sends `total` bytes of the pattern in writes of `size` bytes. */
static void source(int fd)
{
	uint64_t total = get64(fd);
	uint32_t size = get32(fd);
	for (uint64_t at = 0; at < total;) {
		uint64_t count = total - at < size ? total - at : size;
		for (uint64_t i = 0; i < count; i++)
			buffer[i] = pattern(at + i);
		put(fd, buffer, count);
		at += count;
	}
}

/* Sends zeroes as fast as it can. */
static void flood(int fd)
{
	uint64_t total = get64(fd);
	uint32_t size = get32(fd);
	for (uint64_t at = 0; at < total; at += size)
		put(fd, buffer, size);
}

/* Reads to the end; counts the bytes that are where the pattern has them. */
static uint64_t matching(int fd, unsigned pause_us)
{
	uint64_t at = 0;
	for (;;) {
		ssize_t got = read(fd, buffer, sizeof buffer);
		if (got < 0)
			die("sink");
		if (got == 0)
			return at;
		for (ssize_t i = 0; i < got; i++)
			if ((unsigned char)buffer[i] != pattern(at + i))
				return UINT64_MAX;
		at += got;
		if (pause_us)
			usleep(pause_us);
	}
}

static int disk(int fd)
{
	char path[] = "/dev/vda";
	char index;
	get(fd, &index, 1);
	path[7] = 'a' + index;
	int disk = open(path, O_RDWR | O_DIRECT);
	if (disk < 0)
		disk = open(path, O_RDONLY | O_DIRECT);
	if (disk < 0)
		die(path);
	return disk;
}

static uint32_t outcome(long result) { return result < 0 ? errno : 0; }

static void serve(int fd)
{
	char command;
	get(fd, &command, 1);
	char *page = (char *)(((uintptr_t)buffer + 4095) & ~4095ul);
	switch (command) {
	case 'e':
		echo(fd);
		break;
	case 's':
		source(fd);
		break;
	case 'f':
		flood(fd);
		break;
	case 'k':
		put64(fd, matching(fd, 0));
		break;
	case 'l': /* a slow reader */
		put64(fd, matching(fd, 2000));
		break;
	case 'h': /* closes its sending half first */
		put(fd, "half", 4);
		shutdown(fd, SHUT_WR);
		*last_count = matching(fd, 0);
		break;
	case 'H':
		put64(fd, *last_count);
		break;
	case 'x': { /* wants no more: the writer gets an error */
		shutdown(fd, SHUT_RD);
		put(fd, "x", 1);
		char end;
		(void)!read(fd, &end, 1);
		sleep(2);
		break;
	}
	case 'c': {
		int other = dial(get32(fd));
		put32(fd, other < 0 ? errno : 0);
		if (other >= 0) {
			echo(other);
			close(other);
		}
		break;
	}
	case 'i': {
		int d = disk(fd);
		uint64_t size = 0;
		int read_only = -1;
		ioctl(d, BLKGETSIZE64, &size);
		ioctl(d, BLKROGET, &read_only);
		put64(fd, size);
		put32(fd, read_only);
		break;
	}
	case 'r': {
		int d = disk(fd);
		uint64_t offset = get64(fd);
		uint32_t length = get32(fd);
		put32(fd, outcome(pread(d, page, length, offset)));
		put(fd, page, length);
		break;
	}
	case 'w': {
		int d = disk(fd);
		uint64_t offset = get64(fd);
		uint32_t length = get32(fd);
		get(fd, page, length);
		uint32_t error = outcome(pwrite(d, page, length, offset));
		put32(fd, error ? error : outcome(fsync(d)));
		break;
	}
	case 'd':
	case 'z': {
		int d = disk(fd);
		uint64_t range[2];
		range[0] = get64(fd);
		range[1] = get64(fd);
		put32(fd, outcome(ioctl(d, command == 'd' ? BLKDISCARD : BLKZEROOUT, range)));
		break;
	}
	case 'm': { /* makes and checks a file on an ext4 file system */
		get(fd, &command, 1);
		char path[] = "/dev/vda";
		path[7] = 'a' + command;
		if (mount(path, "/mnt", "ext4", 0, "") != 0) {
			put32(fd, errno);
			break;
		}
		int file = open("/mnt/file", O_CREAT | O_RDWR | O_TRUNC, 0644);
		for (uint64_t at = 0; at < sizeof buffer; at++)
			buffer[at] = pattern(at);
		put(file, buffer, sizeof buffer);
		close(file);
		uint32_t error = outcome(umount("/mnt"));
		put32(fd, error);
		break;
	}
	case 'p':
		sync();
		reboot(RB_AUTOBOOT);
		break;
	default:
		fprintf(stderr, "unknown command %d\n", command);
	}
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	signal(SIGCHLD, SIG_IGN);
	mkdir("/dev", 0755);
	mkdir("/mnt", 0755);
	if (mount("dev", "/dev", "devtmpfs", 0, "") != 0)
		perror("devtmpfs");
	last_count = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct sockaddr_vm here = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = 1025 };
	int server = socket(AF_VSOCK, SOCK_STREAM, 0);
	if (server < 0 || bind(server, (struct sockaddr *)&here, sizeof here) != 0 ||
	    listen(server, 64) != 0)
		die("server");
	int ready = dial(1024);
	if (ready < 0)
		die("port 1024");
	put(ready, "ready", 5);
	for (;;) {
		int fd = accept(server, 0, 0);
		if (fd < 0)
			die("accept");
		if (fork() == 0) {
			close(server);
			serve(fd);
			_exit(0);
		}
		close(fd);
	}
}
