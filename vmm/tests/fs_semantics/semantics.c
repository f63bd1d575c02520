/*
 * Checks that a directory behaves as one of a local file system, one line a check: "ok NAME" or
 * "FAIL NAME: why". The same program runs on the host (the reference) and in the guest.
 *
 *   semantics DIR         the checks, in DIR
 *
 * As PID 1 it mounts the share "kiln" at /mnt, checks /mnt/rootfs/work, makes the files that the
 * host looks at afterwards, and does what the kernel command line names (kiln.task=...), then
 * switches the machine off.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <sys/types.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

static void fail(const char *format, ...) {
    va_list arguments;
    printf("FAIL %s: ", getenv("CHECK"));
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
    fflush(stdout);
    _exit(1);
}

#define WANT(condition) \
    do { if (!(condition)) fail("line %d: not %s (errno %s)", __LINE__, #condition, strerror(errno)); } while (0)
#define FAILS(code, expression) \
    do { errno = 0; if ((expression) != -1 || errno != (code)) \
        fail("line %d: %s gave %s, not %s", __LINE__, #expression, strerror(errno), strerror(code)); } while (0)

static struct stat status(const char *path) {
    struct stat st;
    if (lstat(path, &st)) fail("lstat %s: %s", path, strerror(errno));
    return st;
}

static int make(const char *path, mode_t mode) {
    int fd = open(path, O_CREAT | O_EXCL | O_RDWR, mode);
    if (fd < 0) fail("create %s: %s", path, strerror(errno));
    return fd;
}

/* Runs a function as another user and fails the check if that fails. */
static void as_user(uid_t uid, gid_t gid, gid_t group, void (*function)(void)) {
    fflush(stdout);
    pid_t child = fork();
    WANT(child >= 0);
    if (!child) {
        gid_t groups[1] = {group};
        WANT(!setgroups(group ? 1 : 0, groups));
        WANT(!setresgid(gid, gid, gid));
        WANT(!setresuid(uid, uid, uid));
        function();
        _exit(0);
    }
    int result;
    WANT(waitpid(child, &result, 0) == child);
    if (result) _exit(1);
}

/* ---- owners and modes ---- */

static void make_as_user(void) {
    umask(027);
    close(make("file", 0666));
    WANT(!mkdir("dir", 0777));
    WANT(!mknod("fifo", S_IFIFO | 0666, 0));
    WANT(!symlink("nowhere", "link"));
}

static void owners(void) {
    WANT(!chmod(".", 0777));
    as_user(1000, 2000, 0, make_as_user);
    const char *names[] = {"file", "dir", "fifo", "link"};
    mode_t modes[] = {S_IFREG | 0640, S_IFDIR | 0750, S_IFIFO | 0640, S_IFLNK | 0777};
    for (int i = 0; i < 4; i++) {
        struct stat st = status(names[i]);
        WANT(st.st_uid == 1000 && st.st_gid == 2000);
        WANT(st.st_mode == modes[i]);
    }
    WANT(!lchown("link", 5, 6));
    WANT(status("link").st_uid == 5 && status("link").st_gid == 6);
    WANT(!chown("file", 4294967294u, 4294967293u));
    WANT(status("file").st_uid == 4294967294u && status("file").st_gid == 4294967293u);
}

static void write_other(void) {
    int fd = open("suid", O_WRONLY);
    WANT(fd >= 0 && write(fd, "x", 1) == 1);
    close(fd);
    WANT(!truncate("suid2", 0));
}

static void set_id_bits(void) {
    WANT(!chmod(".", 0777));
    int fd = make("suid", 0777);
    close(make("suid2", 0777));
    WANT(!chmod("suid", 06777) && !chmod("suid2", 06777));
    WANT((status("suid").st_mode & 07777) == 06777);
    WANT(write(fd, "root", 4) == 4);
    WANT((status("suid").st_mode & 07777) == 06777);
    as_user(1000, 1000, 0, write_other);
    WANT((status("suid").st_mode & 07777) == 0777);
    WANT((status("suid2").st_mode & 07777) == 0777);
    WANT(!chmod("suid", 06755) && !chown("suid", 1, 1));
    WANT((status("suid").st_mode & 07777) == 0755);
}

static void make_in_setgid(void) {
    umask(002);
    close(make("s/file", 0666));
    WANT(!mkdir("s/dir", 0777));
    WANT(!mkdir("s/dir/deeper", 0777));
}

static void setgid_directory(void) {
    WANT(!mkdir("s", 0777) && !chown("s", 0, 3000) && !chmod("s", 02775));
    as_user(1000, 1000, 3000, make_in_setgid);
    WANT(status("s/file").st_gid == 3000 && status("s/file").st_uid == 1000);
    WANT(status("s/dir").st_gid == 3000 && (status("s/dir").st_mode & 07777) == 02775);
    WANT(status("s/dir/deeper").st_gid == 3000);
}

static void use_group(void) {
    close(make("g/file", 0600));
    WANT(!rename("g/file", "g/file2") && !unlink("g/file2"));
    WANT(!mkdir("g/d", 0700) && !rmdir("g/d"));
    int fd = open("g", O_TMPFILE | O_RDWR, 0600);
    WANT(fd >= 0 || errno == EOPNOTSUPP);
}

static void use_no_group(void) {
    FAILS(EACCES, open("g/other", O_CREAT | O_WRONLY, 0600));
    FAILS(EACCES, mkdir("g/other", 0600));
    FAILS(EACCES, open("g", O_RDONLY));
}

static void supplementary_group(void) {
    WANT(!mkdir("g", 0777) && !chown("g", 0, 4000) && !chmod("g", 0770));
    as_user(1000, 1000, 4000, use_group);
    as_user(1000, 1000, 0, use_no_group);
}

static void be_unprivileged(void) {
    FAILS(EPERM, chmod("root", 0777));
    FAILS(EPERM, chown("root", 1000, 1000));
    FAILS(EACCES, open("root", O_RDONLY));
    FAILS(EACCES, truncate("root", 0));
    FAILS(EPERM, unlink("root"));
    FAILS(EPERM, rename("root", "mine"));
    FAILS(EPERM, utimensat(AT_FDCWD, "root", (struct timespec[]){{1, 0}, {1, 0}}, 0));
    FAILS(EACCES, access("root", R_OK));
    FAILS(EPERM, mknod("node", S_IFCHR | 0666, makedev(1, 3)));
    close(make("mine", 0600));
    WANT(!chmod("mine", 0400));
    FAILS(EACCES, open("mine", O_WRONLY));
    FAILS(EPERM, chown("mine", 0, 0));
}

static void unprivileged(void) {
    close(make("root", 0600));
    WANT(!chmod(".", 01777));
    as_user(1000, 1000, 0, be_unprivileged);
}

/* ---- attributes ---- */

static void xattrs(void) {
    close(make("f", 0644));
    char big[3000], out[4000];
    memset(big, 'b', sizeof big);
    WANT(!setxattr("f", "user.one", "1", 1, XATTR_CREATE));
    FAILS(EEXIST, setxattr("f", "user.one", "1", 1, XATTR_CREATE));
    FAILS(ENODATA, setxattr("f", "user.two", "2", 1, XATTR_REPLACE));
    WANT(!setxattr("f", "user.big", big, sizeof big, 0));
    WANT(getxattr("f", "user.big", NULL, 0) == sizeof big);
    WANT(getxattr("f", "user.big", out, sizeof out) == sizeof big && !memcmp(big, out, sizeof big));
    FAILS(ERANGE, getxattr("f", "user.big", out, 10));
    ssize_t length = listxattr("f", out, sizeof out);
    WANT(length > 0 && memmem(out, length, "user.one", 9) && memmem(out, length, "user.big", 9));
    WANT(!setxattr("f", "user.empty", "", 0, 0) && getxattr("f", "user.empty", out, 10) == 0);
    WANT(!removexattr("f", "user.one"));
    FAILS(ENODATA, getxattr("f", "user.one", out, 10));
    FAILS(EOPNOTSUPP, setxattr("f", "nonsense.x", "1", 1, 0));
    WANT(!symlink("f", "l"));
    FAILS(EPERM, lsetxattr("l", "user.x", "1", 1, 0));
    WANT(!mkdir("d", 0755) && !setxattr("d", "user.d", "dir", 3, 0));
    WANT(getxattr("d", "user.d", out, 10) == 3);
}

static void file_capabilities(void) {
    int fd = make("f", 0755);
    /* VFS_CAP_REVISION_2, effective, cap_net_raw permitted */
    uint32_t capability[5] = {0x02000001, 1 << 13, 0, 0, 0};
    WANT(!setxattr("f", "security.capability", capability, sizeof capability, 0));
    uint32_t out[6];
    WANT(getxattr("f", "security.capability", out, sizeof out) == sizeof capability);
    WANT(!memcmp(capability, out, sizeof capability));
    WANT(write(fd, "x", 1) == 1);
    FAILS(ENODATA, getxattr("f", "security.capability", out, sizeof out));
}

struct acl { uint32_t version; struct { uint16_t tag, perm; uint32_t id; } entry[5]; };

static void acl_writes(void) {
    int fd = open("f", O_RDWR);
    WANT(fd >= 0 && write(fd, "acl", 3) == 3);
    close(fd);
    FAILS(EACCES, open("none", O_RDONLY));
}

static void make_under_acl(void) {
    umask(077);
    close(make("d/file", 0666));
    WANT(!mkdir("d/sub", 0777));
}

static void acls(void) {
    struct acl acl = {2, {{1, 6, -1}, {2, 6, 1001}, {4, 4, -1}, {16, 6, -1}, {32, 0, -1}}};
    struct acl out;
    close(make("f", 0600));
    close(make("none", 0600));
    WANT(!setxattr("f", "system.posix_acl_access", &acl, sizeof acl, 0));
    WANT((status("f").st_mode & 07777) == 0660);
    WANT(getxattr("f", "system.posix_acl_access", &out, sizeof out) == sizeof out);
    WANT(!memcmp(&acl, &out, sizeof acl));
    WANT(!chmod(".", 0755));
    as_user(1001, 1001, 0, acl_writes);
    WANT(!chmod("f", 0600));
    WANT(getxattr("f", "system.posix_acl_access", &out, sizeof out) == sizeof out);
    WANT(out.entry[3].perm == 0);
    /* A default ACL takes the mask's place. */
    acl.entry[4].perm = 4;
    acl.entry[1].perm = 7;
    acl.entry[3].perm = 7;
    acl.entry[0].perm = 7;
    WANT(!mkdir("d", 0777) && !chmod("d", 0777));
    WANT(!setxattr("d", "system.posix_acl_default", &acl, sizeof acl, 0));
    as_user(1000, 1000, 0, make_under_acl);
    WANT((status("d/file").st_mode & 07777) == 0664);
    WANT(getxattr("d/file", "system.posix_acl_access", &out, sizeof out) == sizeof out);
    WANT(out.entry[1].id == 1001 && out.entry[1].perm == 7);
    WANT((status("d/sub").st_mode & 07777) == 0774);
    WANT(getxattr("d/sub", "system.posix_acl_default", &out, sizeof out) == sizeof out);
    int fd = open("d", O_TMPFILE | O_RDWR, 0666);
    if (fd >= 0) {
        struct stat st;
        WANT(!fstat(fd, &st) && (st.st_mode & 07777) == 0664);
        WANT(fgetxattr(fd, "system.posix_acl_access", &out, sizeof out) == sizeof out);
    }
    WANT(!removexattr("d", "system.posix_acl_default"));
}

static void times(void) {
    close(make("f", 0644));
    struct timespec set[2] = {{1000000001, 123456789}, {2000000002, 987654321}};
    WANT(!utimensat(AT_FDCWD, "f", set, 0));
    struct stat st = status("f");
    WANT(st.st_atim.tv_sec == 1000000001 && st.st_atim.tv_nsec == 123456789);
    WANT(st.st_mtim.tv_sec == 2000000002 && st.st_mtim.tv_nsec == 987654321);
    set[0].tv_nsec = UTIME_OMIT;
    set[1].tv_sec = 77;
    set[1].tv_nsec = 7;
    WANT(!utimensat(AT_FDCWD, "f", set, 0));
    st = status("f");
    WANT(st.st_atim.tv_sec == 1000000001 && st.st_mtim.tv_sec == 77 && st.st_mtim.tv_nsec == 7);
    set[0].tv_sec = -5;
    set[0].tv_nsec = 1;
    WANT(!utimensat(AT_FDCWD, "f", set, 0) && status("f").st_atim.tv_sec == -5);
    WANT(!symlink("f", "l"));
    set[1].tv_sec = 99;
    WANT(!utimensat(AT_FDCWD, "l", set, AT_SYMLINK_NOFOLLOW));
    WANT(status("l").st_mtim.tv_sec == 99 && status("f").st_mtim.tv_sec == 77);
    int fd = open("f", O_WRONLY);
    WANT(write(fd, "x", 1) == 1 && !close(fd));
    WANT(status("f").st_mtim.tv_sec > 1000000000);
    WANT(!utimensat(AT_FDCWD, "f", NULL, 0) && status("f").st_atim.tv_sec > 1000000000);
    struct timespec before = status("f").st_ctim;
    usleep(20000);
    WANT(!chmod("f", 0600));
    struct timespec after = status("f").st_ctim;
    WANT(after.tv_sec > before.tv_sec || after.tv_nsec > before.tv_nsec);
    struct timespec directory = status(".").st_mtim;
    usleep(20000);
    close(make("g", 0644));
    struct timespec changed = status(".").st_mtim;
    WANT(changed.tv_sec > directory.tv_sec || changed.tv_nsec > directory.tv_nsec);
}

/* ---- names ---- */

static void hard_links(void) {
    int fd = make("a", 0644);
    WANT(!link("a", "b") && !mkdir("d", 0755) && !link("b", "d/c"));
    WANT(status("a").st_nlink == 3 && status("a").st_ino == status("d/c").st_ino);
    WANT(write(fd, "linked", 6) == 6);
    WANT(status("d/c").st_size == 6);
    WANT(!unlink("a") && status("b").st_nlink == 2);
    WANT(!symlink("b", "s") && !link("s", "s2"));
    WANT(S_ISLNK(status("s2").st_mode) && status("s").st_nlink == 2);
    FAILS(EEXIST, link("b", "d/c"));
    FAILS(EPERM, link("d", "d2"));
    WANT(!mknod("n", S_IFCHR | 0600, makedev(1, 3)) && !link("n", "n2"));
    WANT(status("n2").st_nlink == 2);
}

static void symlinks(void) {
    char target[4096], out[4096];
    memset(target, 't', sizeof target);
    target[4000] = 0;
    WANT(!symlink(target, "long"));
    WANT(readlink("long", out, sizeof out) == 4000 && !memcmp(target, out, 4000));
    WANT(status("long").st_size == 4000);
    WANT(!symlink("../../../../../../etc/passwd", "escape"));
    WANT(readlink("escape", out, sizeof out) == 28);
    WANT(!symlink("loop", "loop"));
    FAILS(ELOOP, open("loop", O_RDONLY));
    FAILS(ELOOP, open("escape", O_RDONLY | O_NOFOLLOW));
    FAILS(ENOENT, symlink("", "empty"));
}

static void names(void) {
    char name[300];
    memset(name, 'n', sizeof name);
    name[255] = 0;
    close(make(name, 0644));
    WANT(status(name).st_size == 0);
    WANT(!unlink(name));
    name[255] = 'n';
    name[256] = 0;
    FAILS(ENAMETOOLONG, open(name, O_CREAT | O_WRONLY, 0644));
    close(make("\xff\x01 new\nline\\\"'$*", 0644));
    WANT(!unlink("\xff\x01 new\nline\\\"'$*"));
    close(make("...", 0644));
    close(make(".hidden", 0644));
    DIR *directory = opendir(".");
    int seen = 0;
    for (struct dirent *entry; (entry = readdir(directory));)
        seen |= (!strcmp(entry->d_name, "...")) | (!strcmp(entry->d_name, ".hidden")) << 1
            | (!strcmp(entry->d_name, ".")) << 2 | (!strcmp(entry->d_name, "..")) << 3;
    closedir(directory);
    WANT(seen == 15);
}

static void errors(void) {
    close(make("f", 0644));
    WANT(!mkdir("d", 0755));
    close(make("d/x", 0644));
    FAILS(EEXIST, open("f", O_CREAT | O_EXCL | O_WRONLY, 0644));
    FAILS(EEXIST, mkdir("d", 0755));
    FAILS(ENOTEMPTY, rmdir("d"));
    FAILS(EISDIR, unlink("d"));
    FAILS(ENOTDIR, rmdir("f"));
    FAILS(ENOTDIR, open("f/x", O_RDONLY));
    FAILS(EISDIR, open("d", O_WRONLY));
    FAILS(ENOENT, open("none", O_RDONLY));
    FAILS(ENOENT, unlink("none"));
    FAILS(ENOTDIR, open("f", O_RDONLY | O_DIRECTORY));
    FAILS(EINVAL, rename("d", "d/y"));
    FAILS(ENOENT, rename("none", "some"));
    FAILS(EISDIR, rename("f", "d"));
}

static void renames(void) {
    close(make("a", 0600));
    close(make("b", 0644));
    ino_t a = status("a").st_ino, b = status("b").st_ino;
    FAILS(EEXIST, renameat2(AT_FDCWD, "a", AT_FDCWD, "b", RENAME_NOREPLACE));
    WANT(!renameat2(AT_FDCWD, "a", AT_FDCWD, "b", RENAME_EXCHANGE));
    WANT(status("a").st_ino == b && status("b").st_ino == a);
    WANT(!rename("a", "b") && status("b").st_ino == b);
    FAILS(ENOENT, lstat("a", &(struct stat){0}));
    WANT(!mkdir("d", 0755) && !mkdir("e", 0755));
    close(make("e/x", 0644));
    FAILS(ENOTEMPTY, rename("d", "e"));
    WANT(!rename("e", "d") && status("d/x").st_size == 0);
    WANT(!rename("b", "d/b"));
    WANT(!renameat2(AT_FDCWD, "d/b", AT_FDCWD, "c", RENAME_WHITEOUT));
    WANT(S_ISCHR(status("d/b").st_mode) && status("d/b").st_rdev == 0);
    int directory = open("d", O_PATH);
    WANT(!rename("d", "moved"));
    WANT(!faccessat(directory, "x", F_OK, 0));
}

static void negative_lookups(void) {
    FAILS(ENOENT, access("later", F_OK));
    pid_t child = fork();
    if (!child) {
        close(make("later", 0644));
        _exit(0);
    }
    int result;
    WANT(waitpid(child, &result, 0) == child && !result);
    WANT(!access("later", F_OK));
}

static void large_directory(void) {
    char name[64];
    WANT(!mkdir("many", 0755));
    for (int i = 0; i < 2000; i++) {
        snprintf(name, sizeof name, "many/a-file-with-a-longish-name-%05d", i);
        close(make(name, 0644));
    }
    /* Deletes while reading, as rm -r does. */
    DIR *directory = opendir("many");
    int deleted = 0;
    for (struct dirent *entry; (entry = readdir(directory));) {
        if (entry->d_name[0] == '.') continue;
        WANT(entry->d_type == DT_REG);
        WANT(!unlinkat(dirfd(directory), entry->d_name, 0));
        deleted++;
    }
    rewinddir(directory);
    int left = 0;
    for (struct dirent *entry; (entry = readdir(directory));) left += entry->d_name[0] != '.';
    closedir(directory);
    WANT(deleted == 2000 && left == 0);
    WANT(!rmdir("many"));
}

/* ---- special files ---- */

static void devices(void) {
    WANT(!mknod("null", S_IFCHR | 0666, makedev(1, 3)));
    WANT(!mknod("block", S_IFBLK | 0600, makedev(259, 65535)));
    WANT(!mknod("large", S_IFCHR | 0600, makedev(4095, 1048575)));
    WANT(status("null").st_rdev == makedev(1, 3) && S_ISCHR(status("null").st_mode));
    WANT(status("block").st_rdev == makedev(259, 65535) && S_ISBLK(status("block").st_mode));
    WANT(status("large").st_rdev == makedev(4095, 1048575));
    int fd = open("null", O_RDWR);
    char byte;
    WANT(fd >= 0 && write(fd, "gone", 4) == 4 && read(fd, &byte, 1) == 0);
    WANT(!chmod("block", 0640) && !chown("block", 3, 4));
    WANT(status("block").st_uid == 3 && (status("block").st_mode & 0777) == 0640);
}

static void fifos(void) {
    WANT(!mkfifo("fifo", 0600));
    pid_t child = fork();
    if (!child) {
        int fd = open("fifo", O_WRONLY);
        _exit(write(fd, "through", 7) != 7);
    }
    char out[8] = {0};
    int fd = open("fifo", O_RDONLY), result;
    WANT(read(fd, out, 7) == 7 && !strcmp(out, "through"));
    WANT(waitpid(child, &result, 0) == child && !result);
}

static void sockets(void) {
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "socket"};
    int server = socket(AF_UNIX, SOCK_STREAM, 0);
    WANT(!bind(server, (void *)&address, sizeof address) && !listen(server, 1));
    WANT(S_ISSOCK(status("socket").st_mode));
    int client = socket(AF_UNIX, SOCK_STREAM, 0);
    WANT(!connect(client, (void *)&address, sizeof address));
    int peer = accept(server, NULL, NULL);
    char out[3] = {0};
    WANT(write(client, "hi", 2) == 2 && read(peer, out, 2) == 2 && !strcmp(out, "hi"));
    FAILS(ENXIO, open("socket", O_RDWR));
}

static void locks(void) {
    int fd = make("f", 0644), result;
    WANT(!flock(fd, LOCK_EX));
    struct flock range = {.l_type = F_WRLCK, .l_start = 10, .l_len = 10};
    int posix = open("f", O_RDWR);
    WANT(!fcntl(posix, F_SETLK, &range));
    pid_t child = fork();
    if (!child) {
        int other = open("f", O_RDWR);
        FAILS(EWOULDBLOCK, flock(other, LOCK_EX | LOCK_NB));
        struct flock same = range;
        FAILS(EAGAIN, fcntl(other, F_SETLK, &same));
        same.l_start = 20;
        WANT(!fcntl(other, F_SETLK, &same));
        same = range;
        WANT(!fcntl(other, F_GETLK, &same) && same.l_type == F_WRLCK && same.l_pid == getppid());
        _exit(0);
    }
    WANT(waitpid(child, &result, 0) == child);
    if (result) _exit(1);
    struct flock own = {.l_type = F_WRLCK, .l_start = 0, .l_len = 5};
    int one = open("f", O_RDWR), two = open("f", O_RDWR);
    WANT(!fcntl(one, F_OFD_SETLK, &own));
    FAILS(EAGAIN, fcntl(two, F_OFD_SETLK, &own));
}

/* ---- contents ---- */

static void nameless_files(void) {
    char path[64], out[16] = {0};
    struct stat st;
    int fd = open(".", O_TMPFILE | O_RDWR, 0640);
    WANT(fd >= 0);
    WANT(!fstat(fd, &st) && st.st_nlink == 0 && (st.st_mode & 07777) == 0640);
    WANT(write(fd, "nameless", 8) == 8 && !fchmod(fd, 0600) && !fchown(fd, 7, 8));
    WANT(!fsetxattr(fd, "user.x", "1", 1, 0) && fgetxattr(fd, "user.x", out, 4) == 1);
    WANT(!ftruncate(fd, 100) && !fstat(fd, &st) && st.st_size == 100 && st.st_uid == 7);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int again = open(path, O_RDONLY);
    WANT(again >= 0 && pread(again, out, 8, 0) == 8 && !strcmp(out, "nameless"));
    WANT(!linkat(AT_FDCWD, path, AT_FDCWD, "named", AT_SYMLINK_FOLLOW));
    WANT(!fstat(fd, &st) && st.st_nlink == 1 && st.st_ino == status("named").st_ino);
    WANT(status("named").st_uid == 7 && (status("named").st_mode & 07777) == 0600);
    WANT(pwrite(fd, "N", 1, 0) == 1);
    int named = open("named", O_RDWR);
    WANT(named >= 0 && pread(named, out, 8, 0) == 8 && !strcmp(out, "Nameless"));
    WANT(pwrite(named, "n", 1, 0) == 1 && pread(fd, out, 8, 0) == 8 && out[0] == 'n');
    WANT(!link("named", "named2") && !fstat(fd, &st) && st.st_nlink == 2);
    WANT(!unlink("named") && !rename("named2", "named3") && !fsync(fd));
    WANT(status("named3").st_ino == st.st_ino);
    /* O_EXCL: never to be named. */
    int exclusive = open(".", O_TMPFILE | O_WRONLY | O_EXCL, 0600);
    WANT(exclusive >= 0);
    snprintf(path, sizeof path, "/proc/self/fd/%d", exclusive);
    FAILS(ENOENT, linkat(AT_FDCWD, path, AT_FDCWD, "never", AT_SYMLINK_FOLLOW));
    int many[300];
    for (int i = 0; i < 300; i++) WANT((many[i] = open(".", O_TMPFILE | O_RDWR, 0600)) >= 0);
    for (int i = 0; i < 300; i++) close(many[i]);
    WANT(status(".").st_nlink == 2);
}

static void sparse_files(void) {
    int fd = make("f", 0644);
    off_t far = 5LL << 30;
    WANT(!ftruncate(fd, far));
    WANT(pwrite(fd, "data", 4, 4LL << 30) == 4);
    WANT(status("f").st_size == far && status("f").st_blocks < 1000);
    WANT(lseek(fd, 0, SEEK_DATA) == 4LL << 30);
    WANT(lseek(fd, 4LL << 30, SEEK_HOLE) == (4LL << 30) + 4096);
    FAILS(ENXIO, lseek(fd, far, SEEK_DATA));
    char out[4];
    WANT(pread(fd, out, 4, 4LL << 30) == 4 && !memcmp(out, "data", 4));
    WANT(pread(fd, out, 4, 1LL << 32) == 4);
    char block[8192];
    memset(block, 'x', sizeof block);
    WANT(pwrite(fd, block, sizeof block, 0) == sizeof block && !fsync(fd));
    WANT(!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096));
    WANT(pread(fd, out, 4, 0) == 4 && !memcmp(out, "\0\0\0\0", 4));
    WANT(lseek(fd, 0, SEEK_DATA) == 4096);
    WANT(!fallocate(fd, FALLOC_FL_ZERO_RANGE, 4096, 100));
    WANT(pread(fd, out, 4, 4096) == 4 && !memcmp(out, "\0\0\0\0", 4));
    int other = make("g", 0644);
    WANT(!fallocate(other, 0, 0, 1 << 20) && status("g").st_size == 1 << 20);
    WANT(status("g").st_blocks >= 2048);
    WANT(!fallocate(other, FALLOC_FL_KEEP_SIZE, 0, 2 << 20) && status("g").st_size == 1 << 20);
}

static void copies(void) {
    int from = make("from", 0644), to = make("to", 0644);
    char block[65536], out[65536];
    for (size_t i = 0; i < sizeof block; i++) block[i] = i * 7;
    WANT(write(from, block, sizeof block) == sizeof block);
    loff_t in = 100, at = 5;
    WANT(copy_file_range(from, &in, to, &at, 60000, 0) == 60000);
    WANT(in == 60100 && at == 60005);
    WANT(pread(to, out, 60000, 5) == 60000 && !memcmp(out, block + 100, 60000));
    WANT(status("to").st_size == 60005);
}

static void mappings(void) {
    int fd = make("f", 0644);
    WANT(!ftruncate(fd, 10000));
    char *map = mmap(NULL, 10000, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    WANT(map != MAP_FAILED);
    memcpy(map + 5000, "mapped", 6);
    char out[7] = {0};
    WANT(pread(fd, out, 6, 5000) == 6 && !strcmp(out, "mapped"));
    WANT(pwrite(fd, "written", 7, 100) == 7 && !memcmp(map + 100, "written", 7));
    WANT(!msync(map, 10000, MS_SYNC) && !munmap(map, 10000) && !close(fd));
    fd = open("f", O_RDONLY);
    WANT(pread(fd, out, 6, 5000) == 6 && !memcmp(out, "mapped", 6));
    char *private = mmap(NULL, 10000, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    WANT(private != MAP_FAILED);
    private[5000] = 'X';
    WANT(pread(fd, out, 1, 5000) == 1 && out[0] == 'm');
}

static void unlinked_files(void) {
    int fd = make("f", 0644);
    WANT(write(fd, "still here", 10) == 10 && !unlink("f"));
    struct stat st;
    char out[11] = {0};
    WANT(!fstat(fd, &st) && st.st_nlink == 0 && st.st_size == 10);
    WANT(pread(fd, out, 10, 0) == 10 && !strcmp(out, "still here"));
    WANT(write(fd, "!", 1) == 1 && !ftruncate(fd, 5) && !fchmod(fd, 0600) && !fsync(fd));
    WANT(!fstat(fd, &st) && st.st_size == 5 && (st.st_mode & 0777) == 0600);
    int second = make("f", 0644);
    struct stat other;
    WANT(!fstat(second, &other) && (other.st_size == 0));
    close(make("g", 0644));
    int replaced = open("g", O_RDWR);
    WANT(write(replaced, "old", 3) == 3 && !rename("f", "g"));
    WANT(pread(replaced, out, 3, 0) == 3 && !memcmp(out, "old", 3));
}

static void direct(void) {
    int fd = open("f", O_CREAT | O_RDWR | O_DIRECT, 0644);
    WANT(fd >= 0);
    char *buffer = aligned_alloc(4096, 8192);
    memset(buffer, 'd', 8192);
    WANT(pwrite(fd, buffer, 8192, 0) == 8192);
    memset(buffer, 0, 8192);
    WANT(pread(fd, buffer, 4096, 4096) == 4096 && buffer[0] == 'd' && buffer[4095] == 'd');
    int cached = open("f", O_RDWR);
    WANT(pread(cached, buffer, 1, 0) == 1 && buffer[0] == 'd');
}

static void appends(void) {
    int one = make("f", 0644);
    close(one);
    one = open("f", O_WRONLY | O_APPEND);
    int two = open("f", O_WRONLY | O_APPEND);
    WANT(write(one, "a", 1) == 1 && write(two, "b", 1) == 1 && write(one, "c", 1) == 1);
    WANT(lseek(one, 0, SEEK_SET) == 0 && write(one, "d", 1) == 1);
    char out[5] = {0};
    int fd = open("f", O_RDONLY);
    WANT(read(fd, out, 5) == 4 && !strcmp(out, "abcd"));
    /* Four processes' lines are never torn or lost. */
    for (int i = 0; i < 4; i++) {
        if (fork()) continue;
        int log = open("log", O_CREAT | O_WRONLY | O_APPEND, 0644);
        for (int j = 0; j < 50; j++) WANT(write(log, "0123456789", 10) == 10);
        _exit(0);
    }
    int result;
    while (wait(&result) > 0) WANT(!result);
    WANT(status("log").st_size == 2000);
}

static void truncation(void) {
    int fd = make("f", 0644);
    WANT(write(fd, "contents", 8) == 8);
    int again = open("f", O_WRONLY | O_TRUNC);
    WANT(again >= 0 && status("f").st_size == 0);
    WANT(!truncate("f", 5000) && status("f").st_size == 5000);
    char out[8];
    WANT(pread(fd, out, 8, 100) == 8 && !memcmp(out, "\0\0\0\0\0\0\0\0", 8));
    WANT(pread(fd, out, 8, 5000) == 0);
    FAILS(EINVAL, truncate("f", -1));
    close(open("f", O_CREAT | O_WRONLY | O_TRUNC, 0600));
    WANT(status("f").st_size == 0 && (status("f").st_mode & 0777) == 0644);
}

static void executables(void) {
    int from = open("/proc/self/exe", O_RDONLY), to = make("program", 0755);
    struct stat st;
    WANT(!fstat(from, &st));
    char *map = mmap(NULL, st.st_size, PROT_READ, MAP_PRIVATE, from, 0);
    WANT(write(to, map, st.st_size) == st.st_size && !close(to));
    pid_t child = fork();
    if (!child) {
        execl("./program", "program", "--sleep", NULL);
        _exit(99);
    }
    usleep(300000);
    FAILS(ETXTBSY, open("program", O_WRONLY));
    int result;
    WANT(!kill(child, 9) && waitpid(child, &result, 0) == child && WIFSIGNALED(result));
    WANT(!chmod("program", 0644));
    FAILS(EACCES, execl("./program", "program", "--sleep", NULL));
}

static void file_systems(void) {
    struct statvfs fs;
    WANT(!statvfs(".", &fs) && fs.f_bsize >= 512 && fs.f_blocks > 0 && fs.f_namemax == 255);
    int fd = open(".", O_RDONLY);
    WANT(!syncfs(fd) && !fsync(fd));
}

static void working_directory(void) {
    char path[4096];
    WANT(!mkdir("a", 0755) && !mkdir("a/b", 0755) && !chdir("a/b"));
    WANT(!rename("../../a", "../../c"));
    WANT(getcwd(path, sizeof path) && strstr(path, "/c/b"));
    close(make("../../top", 0644));
    WANT(!chdir("../.."));
    WANT(status("top").st_size == 0);
}

static const struct { const char *name; void (*run)(void); } CHECKS[] = {
    {"owners", owners}, {"set_id_bits", set_id_bits}, {"setgid_directory", setgid_directory},
    {"supplementary_group", supplementary_group}, {"unprivileged", unprivileged},
    {"xattrs", xattrs}, {"file_capabilities", file_capabilities}, {"acls", acls},
    {"times", times}, {"hard_links", hard_links}, {"symlinks", symlinks}, {"names", names},
    {"errors", errors}, {"renames", renames}, {"negative_lookups", negative_lookups},
    {"large_directory", large_directory}, {"devices", devices}, {"fifos", fifos},
    {"sockets", sockets}, {"locks", locks}, {"nameless_files", nameless_files},
    {"sparse_files", sparse_files}, {"copies", copies}, {"mappings", mappings},
    {"unlinked_files", unlinked_files}, {"direct", direct}, {"appends", appends},
    {"truncation", truncation}, {"executables", executables}, {"file_systems", file_systems},
    {"working_directory", working_directory},
};

static void check_all(const char *directory) {
    char path[4096];
    for (size_t i = 0; i < sizeof CHECKS / sizeof *CHECKS; i++) {
        fflush(stdout);
        pid_t child = fork();
        if (!child) {
            setenv("CHECK", CHECKS[i].name, 1);
            umask(022);
            snprintf(path, sizeof path, "%s/%s", directory, CHECKS[i].name);
            WANT(!mkdir(path, 0755) && !chdir(path));
            CHECKS[i].run();
            printf("ok %s\n", CHECKS[i].name);
            fflush(stdout);
            _exit(0);
        }
        int result;
        waitpid(child, &result, 0);
        if (!WIFEXITED(result)) printf("FAIL %s: signal %d\n", CHECKS[i].name, WTERMSIG(result));
    }
}

/* ---- the guest's side of the tests ---- */

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

/* Leaves files whose every attribute the host looks at. */
static void leave(void) {
    setenv("CHECK", "leave", 1);
    WANT(!mkdir("/mnt/rootfs/left", 0755) && !chdir("/mnt/rootfs/left"));
    umask(0);
    int fd = make("file", 0600);
    WANT(write(fd, "from the guest", 14) == 14);
    WANT(!chown("file", 1234, 4321) && !chmod("file", 04751));
    WANT(!setxattr("file", "user.kiln", "value", 5, 0) && !link("file", "second"));
    struct timespec set[2] = {{1111111111, 11}, {1222222222, 22}};
    WANT(!utimensat(AT_FDCWD, "file", set, 0));
    int sparse = make("sparse", 0644);
    WANT(!ftruncate(sparse, 1LL << 32) && pwrite(sparse, "end", 3, (1LL << 32) - 3) == 3);
    WANT(!mknod("device", S_IFBLK | 0640, makedev(259, 7)) && !mkfifo("fifo", 0622));
    WANT(!symlink("/etc/passwd", "link") && !mkdir("dir", 01771));
    struct acl acl = {2, {{1, 6, -1}, {2, 6, 1001}, {4, 4, -1}, {16, 6, -1}, {32, 0, -1}}};
    WANT(!setxattr("second", "system.posix_acl_access", &acl, sizeof acl, 0));
    sync();
    printf("ok leave\n");
}

static void mounts(void) {
    setenv("CHECK", "mounts", 1);
    char out[64] = {0};
    /* 0: a directory, 1: read-only, 2: a file, 3: a read-only file */
    close(make("/mnt/mounts/0/made", 0644));
    DIR *directory = opendir("/mnt/mounts/0");
    for (struct dirent *entry; (entry = readdir(directory));)
        if (!strcmp(entry->d_name, "made")) WANT(entry->d_ino == status("/mnt/mounts/0/made").st_ino);
    closedir(directory);
    int fd = open("/mnt/mounts/1/hello", O_RDONLY);
    WANT(fd >= 0 && read(fd, out, 64) == 6 && !strcmp(out, "hello\n"));
    FAILS(EROFS, open("/mnt/mounts/1/made", O_CREAT | O_WRONLY, 0644));
    FAILS(EROFS, open("/mnt/mounts/1/hello", O_WRONLY));
    FAILS(EROFS, unlink("/mnt/mounts/1/hello"));
    FAILS(EROFS, chmod("/mnt/mounts/1/hello", 0600));
    fd = open("/mnt/mounts/2", O_RDWR | O_TRUNC);
    WANT(fd >= 0 && write(fd, "changed", 7) == 7);
    FAILS(EROFS, open("/mnt/mounts/3", O_WRONLY));
    FAILS(EROFS, mkdir("/mnt/new", 0755));
    FAILS(EROFS, mkdir("/mnt/mounts/new", 0755));
    FAILS(EXDEV, rename("/mnt/mounts/0/made", "/mnt/rootfs/made"));
    FAILS(EXDEV, link("/mnt/mounts/0/made", "/mnt/rootfs/made"));
    /* The host's two names of one file look like two files, as they lie in two mounts. */
    WANT(status("/mnt/mounts/0/same").st_ino != status("/mnt/rootfs/same").st_ino);
    FAILS(EROFS, rmdir("/mnt/mounts/0"));
    printf("ok mounts\n");
    /* The host makes a file once it has read this line, which has been looked for already. */
    FAILS(ENOENT, access("/mnt/mounts/0/signal", F_OK));
    printf("waiting\n");
    for (int i = 0; access("/mnt/mounts/0/signal", F_OK); i++) {
        if (i > 300) fail("the host's file did not show");
        usleep(100000);
    }
    printf("ok host_file_shows\n");
}

/* A hundred directories of a hundred files are more than the server may have open. */
static void beyond_limit(void) {
    char path[64];
    struct stat st;
    setenv("CHECK", "beyond_limit", 1);
    int known = 0, failed = 0;
    for (; known < 10000; known++) {
        snprintf(path, sizeof path, "/mnt/rootfs/%d/%d", known / 100, known % 100);
        if (stat(path, &st)) { failed = errno; break; }
    }
    printf("knew %d\n", known);
    errno = failed;
    WANT(known > 100 && failed == ENFILE);
    printf("ok beyond_limit\n");

    setenv("CHECK", "forget", 1);
    int fd = open("/proc/sys/vm/drop_caches", O_WRONLY);
    WANT(fd >= 0 && write(fd, "2", 1) == 1);
    /* What is forgotten is told to the server in the background. */
    for (int i = 0; stat(path, &st); i++) {
        WANT(errno == ENFILE && i < 300);
        usleep(100000);
    }
    printf("ok forget\n");
}

static void speed(const char *directory) {
    char path[4096];
    setenv("CHECK", "speed", 1);
    struct stat st;
    WANT(!mkdir(directory, 0755) && !chdir(directory));
    double start = now();
    for (int i = 0; i < 5000; i++) {
        snprintf(path, sizeof path, "file%d", i);
        int fd = make(path, 0644);
        WANT(write(fd, "small", 5) == 5 && !close(fd));
    }
    double created = now();
    for (int i = 0; i < 5000; i++) {
        snprintf(path, sizeof path, "file%d", i);
        WANT(!stat(path, &st));
    }
    double looked = now();
    for (int i = 0; i < 5000; i++) {
        snprintf(path, sizeof path, "file%d", i);
        WANT(!unlink(path));
    }
    double unlinked = now();
    static char block[1 << 20];
    int fd = make("big", 0644);
    for (int i = 0; i < 64; i++) WANT(write(fd, block, sizeof block) == sizeof block);
    double written = now();
    WANT(!posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED));
    for (int i = 0; i < 64; i++) WANT(pread(fd, block, sizeof block, (off_t)i << 20) == sizeof block);
    double done = now();
    WANT(!unlink("big"));
    printf("speed create %.3f stat %.3f unlink %.3f write %.3f read %.3f\n", created - start,
        looked - created, unlinked - looked, written - unlinked, done - written);
    printf("ok speed\n");
}

static int guest(void) {
    char line[4096] = {0};
    mkdir("/proc", 0755);
    mkdir("/mnt", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    int fd = open("/proc/cmdline", O_RDONLY);
    read(fd, line, sizeof line - 1);
    setenv("CHECK", "mount", 1);
    if (mount("kiln", "/mnt", "virtiofs", 0, NULL)) printf("FAIL mount: %s\n", strerror(errno));
    else if (strstr(line, "kiln.task=check")) {
        WANT(!mkdir("/mnt/rootfs/work", 0755));
        check_all("/mnt/rootfs/work");
        if (!fork()) { mounts(); fflush(stdout); _exit(0); }
        wait(NULL);
        if (!fork()) { leave(); fflush(stdout); _exit(0); }
        wait(NULL);
    } else if (strstr(line, "kiln.task=beyond-limit")) beyond_limit();
    else if (strstr(line, "kiln.task=speed-rootfs")) speed("/mnt/rootfs/speed");
    else if (strstr(line, "kiln.task=speed-top")) speed("/mnt/speed");
    else printf("FAIL task: none given\n");
    printf("end\n");
    fflush(stdout);
    sync();
    umount("/mnt");
    reboot(RB_AUTOBOOT);
    return 1;
}

int main(int count, char **arguments) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (count > 1 && !strcmp(arguments[1], "--sleep")) return sleep(60);
    if (getpid() == 1) {
        if (!fork()) { fflush(stdout); _exit(0); }
        wait(NULL);
        return guest();
    }
    if (count != 2) {
        fprintf(stderr, "usage: semantics DIR\n");
        return 2;
    }
    check_all(arguments[1]);
    return 0;
}
