/* What somebody does who has taken over the process that runs a guest: takes as much as he gets. It is
 * meant to be read beside outside.rs, which starts it in QEMU's place.
 *
 * With -DMEMORY it takes memory, with -DTASKS processes; it says on standard output what it got. */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PIECE = 8 << 20 };

int main(void)
{
#ifdef MEMORY
	for (;;) {
		void *more = mmap(0, PIECE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (more == MAP_FAILED)
			break;
		memset(more, 1, PIECE);
	}
	puts("no more memory");
#endif
#ifdef TASKS
	int count = 0;
	for (;;) {
		pid_t child = fork();
		if (child < 0)
			break;
		if (child == 0)
			for (;;)
				pause();
		count++;
	}
	printf("%d processes\n", count);
#endif
	fflush(stdout);
	for (;;)
		pause();
}
