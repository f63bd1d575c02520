/* PID 1 of the guest of these tests: a server on vsock port 1025. Each connection begins with one
 * byte that says what it does; numbers are little-endian. It is meant to be read beside guest.rs. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <arpa/inet.h>
#include <dirent.h>
#include <linux/fs.h>
#include <linux/vm_sockets.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/ip_icmp.h>
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

/* The guest's end of the network: 10.9.0.2/24 and fd09::2/64 on eth0; the host's ends with 1. */
static const char *const guest_address[] = { "10.9.0.2", "fd09::2" };
static const char *const host_address[] = { "10.9.0.1", "fd09::1" };

struct in6_ifreq { struct in6_addr address; uint32_t prefix; int index; };

static void must(int result, const char *what)
{
	if (result < 0)
		die(what);
}

static void bring_up(const char *name)
{
	struct ifreq request = { 0 };
	int s = socket(AF_INET, SOCK_DGRAM, 0);
	strcpy(request.ifr_name, name);
	must(ioctl(s, SIOCGIFFLAGS, &request), "SIOCGIFFLAGS");
	request.ifr_flags |= IFF_UP;
	must(ioctl(s, SIOCSIFFLAGS, &request), "SIOCSIFFLAGS");
	close(s);
}

static void configure(void)
{
	struct ifreq request = { .ifr_name = "eth0" };
	struct sockaddr_in *address = (struct sockaddr_in *)&request.ifr_addr;
	int s = socket(AF_INET, SOCK_DGRAM, 0);
	bring_up("lo");
	bring_up("eth0");
	address->sin_family = AF_INET;
	inet_pton(AF_INET, guest_address[0], &address->sin_addr);
	must(ioctl(s, SIOCSIFADDR, &request), "SIOCSIFADDR");
	inet_pton(AF_INET, "255.255.255.0", &address->sin_addr);
	must(ioctl(s, SIOCSIFNETMASK, &request), "SIOCSIFNETMASK");
	struct in6_ifreq request6 = { .prefix = 64 };
	must(ioctl(s, SIOCGIFINDEX, &request), "SIOCGIFINDEX");
	request6.index = request.ifr_ifindex;
	inet_pton(AF_INET6, guest_address[1], &request6.address);
	int s6 = socket(AF_INET6, SOCK_DGRAM, 0);
	must(ioctl(s6, SIOCSIFADDR, &request6), "SIOCSIFADDR of IPv6");
	/* It can't be used before nobody has been found who has it. */
	struct sockaddr_in6 own = { .sin6_family = AF_INET6, .sin6_addr = request6.address };
	while (bind(s6, (struct sockaddr *)&own, sizeof own) != 0)
		usleep(50000);
	close(s6);
	close(s);
}

/* Copies a file of eth0 in /sys. */
static void tell(int fd, const char *name)
{
	char path[64], line[128];
	snprintf(path, sizeof path, "/sys/class/net/eth0/%s", name);
	int file = open(path, O_RDONLY);
	must(file, path);
	ssize_t length = read(file, line, sizeof line);
	must(length, path);
	put(fd, line, length);
	close(file);
}

static void put_into(const char *path, const char *text)
{
	int file = open(path, O_WRONLY);
	must(file, path);
	put(file, text, strlen(text));
	close(file);
}

/* Takes the driver away from the card and gives it back, which resets the card. */
static void rebind(void)
{
	char link[256] = { 0 };
	must(readlink("/sys/class/net/eth0/device", link, sizeof link - 1), "eth0");
	const char *name = strrchr(link, '/') + 1;
	put_into("/sys/bus/virtio/drivers/virtio_net/unbind", name);
	put_into("/sys/bus/virtio/drivers/virtio_net/bind", name);
}

/* An address of the guest (0) or the host (1), of IPv4 (0) or IPv6 (1). */
static socklen_t place(struct sockaddr_storage *where, int host, int v6, uint16_t port)
{
	const char *text = (host ? host_address : guest_address)[v6];
	memset(where, 0, sizeof *where);
	if (v6) {
		struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)where;
		in6->sin6_family = AF_INET6;
		in6->sin6_port = htons(port);
		inet_pton(AF_INET6, text, &in6->sin6_addr);
		return sizeof *in6;
	}
	struct sockaddr_in *in = (struct sockaddr_in *)where;
	in->sin_family = AF_INET;
	in->sin_port = htons(port);
	inet_pton(AF_INET, text, &in->sin_addr);
	return sizeof *in;
}

/* Sends echo requests to the host; returns how many were answered. */
static uint32_t ping(uint32_t count, uint32_t size)
{
	struct sockaddr_storage to;
	struct timeval patience = { .tv_sec = 20 };
	int s = socket(AF_INET, SOCK_RAW, IPPROTO_ICMP);
	must(s, "raw socket");
	setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	must(connect(s, (struct sockaddr *)&to, place(&to, 1, 0, 0)), "connect");
	struct icmphdr *icmp = (struct icmphdr *)buffer;
	uint32_t answered = 0;
	for (uint32_t n = 0; n < count; n++) {
		memset(buffer, n, size);
		memset(icmp, 0, sizeof *icmp);
		icmp->type = ICMP_ECHO;
		icmp->un.echo.sequence = n;
		uint32_t sum = 0;
		for (uint32_t at = 0; at < size; at += 2)
			sum += *(uint16_t *)(buffer + at);
		sum = (sum & 0xffff) + (sum >> 16);
		icmp->checksum = ~((sum & 0xffff) + (sum >> 16));
		must(send(s, buffer, size, 0), "ping");
		for (;;) {
			ssize_t got = recv(s, buffer, sizeof buffer, 0);
			struct icmphdr *reply = (struct icmphdr *)(buffer + 20);
			if (got < 0)
				return answered;
			if (got == size + 20 && reply->type == ICMP_ECHOREPLY &&
			    reply->un.echo.sequence == n)
				break;
		}
		answered++;
	}
	return answered;
}

static void serve(int fd);

/* Takes commands from the host over TCP, having called it. */
static void serve_host(int v6, uint16_t port)
{
	struct sockaddr_storage to;
	int s = socket(v6 ? AF_INET6 : AF_INET, SOCK_STREAM, 0);
	must(connect(s, (struct sockaddr *)&to, place(&to, 1, v6, port)), "connect");
	serve(s);
	close(s);
}

/* Takes commands over TCP from whoever calls; tells `fd` when it can be called. */
static void serve_callers(int fd, int v6, uint16_t port)
{
	struct sockaddr_storage here;
	int s = socket(v6 ? AF_INET6 : AF_INET, SOCK_STREAM, 0);
	must(bind(s, (struct sockaddr *)&here, place(&here, 0, v6, port)), "bind");
	must(listen(s, 8), "listen");
	put32(fd, 0);
	for (;;) {
		int caller = accept(s, 0, 0);
		must(caller, "accept");
		serve(caller);
		close(caller);
	}
}

/* Sends datagrams back, never cut into fragments if `whole`. */
static void echo_datagrams(int fd, int v6, uint16_t port, int whole)
{
	struct sockaddr_storage here, from;
	int s = socket(v6 ? AF_INET6 : AF_INET, SOCK_DGRAM, 0);
	int discover = IP_PMTUDISC_DO;
	if (whole)
		must(setsockopt(s, IPPROTO_IP, IP_MTU_DISCOVER, &discover, sizeof discover), "whole");
	must(bind(s, (struct sockaddr *)&here, place(&here, 0, v6, port)), "bind");
	put32(fd, 0);
	for (;;) {
		socklen_t length = sizeof from;
		ssize_t got = recvfrom(s, buffer, 65536, 0, (struct sockaddr *)&from, &length);
		must(got, "recvfrom");
		must(sendto(s, buffer, got, 0, (struct sockaddr *)&from, length), "sendto");
	}
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
	case 'o': { /* counts what comes */
		uint64_t count = 0;
		ssize_t got;
		while ((got = read(fd, buffer, sizeof buffer)) > 0)
			count += got;
		put64(fd, count);
		break;
	}
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
	case 'n': /* sets the network up */
		configure();
		tell(fd, "mtu");
		tell(fd, "address");
		tell(fd, "carrier");
		tell(fd, "device/features");
		break;
	case 'N': /* what has become of it */
		tell(fd, "statistics/rx_errors");
		tell(fd, "statistics/tx_errors");
		tell(fd, "statistics/tx_dropped");
		break;
	case 'R':
		rebind();
		put32(fd, 0);
		break;
	case 'g': {
		uint32_t count = get32(fd);
		put32(fd, ping(count, get32(fd)));
		break;
	}
	case 't': {
		uint32_t v6 = get32(fd);
		serve_host(v6, get32(fd));
		break;
	}
	case 'T': {
		uint32_t v6 = get32(fd);
		serve_callers(fd, v6, get32(fd));
		break;
	}
	case 'u':
	case 'U': {
		uint32_t v6 = get32(fd);
		echo_datagrams(fd, v6, get32(fd), command == 'U');
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
	mkdir("/sys", 0755);
	if (mount("dev", "/dev", "devtmpfs", 0, "") != 0)
		perror("devtmpfs");
	if (mount("sys", "/sys", "sysfs", 0, "") != 0)
		perror("sysfs");
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
