/* Loaded by LD_PRELOAD: after fault_arm() the n-th call of one kind on a file below a folder fails, once.

   A sync that fails loses, if asked, what was written to the file since its last good sync, as a disk may. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static char below[PATH_MAX], kind[16];
static long wanted, seen;
static int failure, loses, armed;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

struct old { int file; off_t at; size_t length; char *bytes; struct old *next; };
static struct old *unsynced;

void fault_arm(const char *folder, const char *call, long number, int error, int lose) {
    snprintf(below, sizeof below, "%s/", folder);
    snprintf(kind, sizeof kind, "%s", call);
    wanted = number, failure = error, loses = lose, seen = 0, armed = 1;
}

void fault_disarm(void) { armed = 0; }

long fault_seen(void) { return seen; }

static int is_below(const char *path) { return path && !strncmp(path, below, strlen(below)); }

static int file_below(int file) {
    char link[64], path[PATH_MAX];
    if (file < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_below(path);
}

static int fails(const char *call, int concerned) {
    if (!concerned || strcmp(kind, call)) return 0;
    if (__sync_add_and_fetch(&seen, 1) != wanted) return 0;
    errno = failure;
    return 1;
}

static void remember(int file, off_t at, size_t length) {
    REAL(ssize_t, "pread64", int, void *, size_t, off_t);
    struct old *one = malloc(sizeof *one);
    *one = (struct old){file, at, length, calloc(length ? length : 1, 1), 0};
    if (real(file, one->bytes, length, at) < 0) memset(one->bytes, 0, length);
    pthread_mutex_lock(&lock);
    one->next = unsynced, unsynced = one;
    pthread_mutex_unlock(&lock);
}

static void forget(int file, int undo) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off_t);
    pthread_mutex_lock(&lock);
    for (struct old **place = &unsynced; *place;) {
        struct old *one = *place;
        if (one->file != file) { place = &one->next; continue; }
        if (undo && real(file, one->bytes, one->length, one->at) < 0) abort();
        *place = one->next;
        free(one->bytes), free(one);
    }
    pthread_mutex_unlock(&lock);
}

ssize_t pwrite64(int file, const void *data, size_t length, off_t at) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off_t);
    int ours = armed && file_below(file);
    if (fails("pwrite", ours)) return -1;
    if (ours && loses) remember(file, at, length);
    return real(file, data, length, at);
}
ssize_t pwrite(int file, const void *data, size_t length, off_t at) { return pwrite64(file, data, length, at); }

ssize_t write(int file, const void *data, size_t length) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (fails("write", armed && file_below(file))) return -1;
    return real(file, data, length);
}

int fsync(int file) {
    REAL(int, "fsync", int);
    int ours = armed && file_below(file);
    if (fails("fsync", ours)) { if (loses) { int e = errno; forget(file, 1); errno = e; } return -1; }
    int result = real(file);
    if (ours && loses) forget(file, 0);
    return result;
}

int fdatasync(int file) {
    REAL(int, "fdatasync", int);
    int ours = armed && file_below(file);
    if (fails("fdatasync", ours)) { if (loses) { int e = errno; forget(file, 1); errno = e; } return -1; }
    int result = real(file);
    if (ours && loses) forget(file, 0);
    return result;
}

int close(int file) {
    REAL(int, "close", int);
    if (armed && loses) forget(file, 0);
    return real(file);
}

int ftruncate64(int file, off_t length) {
    REAL(int, "ftruncate64", int, off_t);
    if (fails("ftruncate", armed && file_below(file))) return -1;
    return real(file, length);
}
int ftruncate(int file, off_t length) { return ftruncate64(file, length); }

int posix_fallocate64(int file, off_t at, off_t length) { /* returns the error; counted with ftruncate */
    REAL(int, "posix_fallocate64", int, off_t, off_t);
    if (fails("ftruncate", armed && file_below(file))) return failure;
    return real(file, at, length);
}
int posix_fallocate(int file, off_t at, off_t length) { return posix_fallocate64(file, at, length); }

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    if (fails("rename", armed && (is_below(from) || is_below(to)))) return -1;
    return real(from, to);
}

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    if (fails("unlink", armed && is_below(path))) return -1;
    return real(path);
}

#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, const char *, int, ...); \
        va_list rest; va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (fails("open", armed && is_below(path))) return -1; \
        return real(path, flags, mode); \
    }
OPENS(open)
OPENS(open64)

void *mmap64(void *address, size_t length, int protection, int flags, int file, off_t at) {
    REAL(void *, "mmap64", void *, size_t, int, int, int, off_t);
    if (fails("mmap", armed && file_below(file))) return MAP_FAILED;
    return real(address, length, protection, flags, file, at);
}
void *mmap(void *address, size_t length, int protection, int flags, int file, off_t at) {
    return mmap64(address, length, protection, flags, file, at);
}
