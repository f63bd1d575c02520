/* An agent that was taken over: PID 1 of a guest, which connects to the monitor as kiln's agent does
 * and then plays the script that it was compiled with (-include). It is meant to be read beside
 * agent.rs.
 *
 * Steps: 's' LENGTH BYTES sends, 'f' LENGTH BYTES sends the same for ever, 'r' reads a frame,
 * 'c' closes the connection, 'n' makes as many further connections as it can, 'p' SECONDS pauses,
 * 'l' loops for ever, 'm' COUNT starts processes that do, 't' takes streams from here on and ends each
 * at once, 'x' exits. At the end it waits for ever.
 * SECONDS and COUNT have 1 byte, LENGTH has 4, little-endian. */
#define _GNU_SOURCE
#include <linux/vm_sockets.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static char buffer[1 << 16];

static int dial(void)
{
	struct sockaddr_vm host = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = PORT};
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
	if (fd >= 0 && connect(fd, (struct sockaddr *)&host, sizeof host) != 0) {
		close(fd);
		return -1;
	}
	return fd;
}

static int put(int fd, const unsigned char *from, uint32_t count)
{
	while (count > 0) {
		ssize_t done = write(fd, from, count);
		if (done <= 0)
			return -1;
		from += done;
		count -= done;
	}
	return 0;
}

static int take(int fd, uint32_t count)
{
	while (count > 0) {
		ssize_t got = read(fd, buffer, count < sizeof buffer ? count : sizeof buffer);
		if (got <= 0)
			return -1;
		count -= got;
	}
	return 0;
}

static void take_streams(void)
{
	struct sockaddr_vm own = {
		.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = STREAM_PORT,
	};
	int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
	if (bind(listener, (struct sockaddr *)&own, sizeof own) != 0 || listen(listener, 16) != 0)
		_exit(1);
	if (fork() != 0) {
		close(listener);
		return;
	}
	/* The connection to the monitor is the other process's. */
	for (int fd = 3; fd < listener; fd++)
		close(fd);
	for (;;) {
		int stream = accept(listener, 0, 0);
		take(stream, STREAM_HEADER);
		close(stream);
	}
}

static uint32_t number(const unsigned char *at)
{
	uint32_t value;
	memcpy(&value, at, sizeof value);
	return value;
}

int main(void)
{
	int fd = dial();
	for (const unsigned char *at = SCRIPT; at < SCRIPT + sizeof SCRIPT;) {
		uint32_t length;
		switch (*at++) {
		case 's':
			length = number(at);
			put(fd, at + 4, length);
			at += 4 + length;
			break;
		case 'f':
			while (put(fd, at + 4, number(at)) == 0)
				;
			at += 4 + number(at);
			break;
		case 'r':
			if (read(fd, &length, sizeof length) == sizeof length)
				take(fd, length);
			break;
		case 'c':
			close(fd);
			break;
		case 'p':
			sleep(*at++);
			break;
		case 'l':
			for (;;)
				__asm__ volatile("");
		case 'm':
			for (int i = *at++; i > 0; i--)
				if (fork() == 0)
					for (;;)
						__asm__ volatile("");
			break;
		case 't':
			take_streams();
			break;
		case 'x':
			return 1;
		case 'n':
			for (int i = 0; i < 500; i++)
				dial();
			break;
		}
	}
	for (;;)
		pause();
}
