/* Faults at exact places: preloaded into a program of ours, it watches what the program writes, and at the place that a rule
 * names it stops the program (SIGSTOP) or lets the call fail. The test outside then looks, kills, and lets things go on.
 *
 * FAULT_RULES holds one rule a line, its fields divided by tabs:
 *
 *   program  place  file  text  number  deed
 *
 * place: `synced`    the number-th sync of a file of that path whose last write held the text: the bytes are durable;
 *        `written`   the number-th such write itself: half of it is done;
 *        `read`      the number-th read at an offset of a file of that path;
 *        `sent`, `received`   so many bytes over one socket.
 * deed:  `stop`, or `fail`.
 *
 * Each rule is carried out once by one process of all: the one that makes FAULT_FOLDER/<rule>, which then holds its id.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MOST_RULES = 8, MOST_FILES = 1024, LONGEST = 4096 };
enum place { SYNCED, WRITTEN, READ, SENT, RECEIVED, PLACES };
static const char *const PLACE_NAMES[PLACES] = {"synced", "written", "read", "sent", "received"};

struct rule {
    enum place place;
    const char *file;
    const char *text;
    long number;
    int fails;
    /* How often its place was come to. */
    long seen;
    /* The file whose last write held the text, if it was not synced since. */
    int pending;
    int is_done;
};

static struct rule rules[MOST_RULES];
static int rule_count;
static const char *folder;
static long moved[2][MOST_FILES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void give_up(const char *what) {
    dprintf(2, "fault.c: %s\n", what);
    _exit(99);
}

__attribute__((constructor)) static void load(void) {
    const char *given = getenv("FAULT_RULES");
    folder = getenv("FAULT_FOLDER");
    if (!given || !folder) return;
    char name[32] = "";
    int comm = open("/proc/self/comm", O_RDONLY);
    ssize_t length = comm < 0 ? 0 : read(comm, name, sizeof name - 1);
    if (comm >= 0) close(comm);
    if (length > 0 && name[length - 1] == '\n') name[length - 1] = 0;
    char *lines = strdup(given), *line;
    for (int index = 0; (line = strsep(&lines, "\n")); index++) {
        if (index == MOST_RULES) give_up("too many rules");
        char *field[6];
        for (int at = 0; at < 6; at++)
            if (!(field[at] = strsep(&line, "\t"))) give_up("a rule has six fields");
        struct rule *rule = &rules[index];
        rule_count = index + 1;
        rule->is_done = strcmp(field[0], name) != 0;
        for (rule->place = 0; rule->place < PLACES && strcmp(field[1], PLACE_NAMES[rule->place]); rule->place++) {}
        if (rule->place == PLACES) give_up("no such place");
        rule->file = field[2];
        rule->text = field[3];
        rule->number = atol(field[4]);
        rule->fails = !strcmp(field[5], "fail");
        rule->pending = -1;
    }
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int is_file(int fd, const char *wanted) {
    char link[64], path[LONGEST];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return path[0] == '/' && strstr(path, wanted) != NULL;
}

static int is_socket(int fd) {
    int type;
    socklen_t size = sizeof type;
    return fd >= 0 && fd < MOST_FILES && getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0;
}

/* Whether this process is the one that carries the rule out. */
static int claims(int index) {
    char path[LONGEST], id[16];
    snprintf(path, sizeof path, "%s/%d", folder, index);
    rules[index].is_done = 1;
    int mark = (int)syscall(SYS_openat, AT_FDCWD, path, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0666);
    if (mark < 0) return 0;
    int length = snprintf(id, sizeof id, "%d\n", getpid());
    syscall(SYS_write, mark, id, (size_t)length);
    syscall(SYS_close, mark);
    return 1;
}

/* Returns only when somebody outside lets the process go on. The signal is for this thread: another one that took it for the
 * process would let this one run on for a while. */
static void stand_still(void) { syscall(SYS_tgkill, getpid(), (pid_t)syscall(SYS_gettid), SIGSTOP); }

/* The rule of this place that is due, or none. Called with the lock. */
static int due(enum place place, int fd, const void *bytes, size_t length) {
    for (int index = 0; index < rule_count; index++) {
        struct rule *rule = &rules[index];
        if (rule->is_done || rule->place != place || !is_file(fd, rule->file)) continue;
        if (*rule->text && !(bytes && memmem(bytes, length, rule->text, strlen(rule->text)))) continue;
        if (++rule->seen == rule->number && claims(index)) return index;
    }
    return -1;
}

static int due_on_socket(enum place place, int fd, size_t more) {
    long *sum = &moved[place == RECEIVED][fd];
    *sum += (long)more;
    for (int index = 0; index < rule_count; index++) {
        struct rule *rule = &rules[index];
        if (!rule->is_done && rule->place == place && *sum >= rule->number && claims(index)) return index;
    }
    return -1;
}

static int has_place(enum place place) {
    for (int index = 0; index < rule_count; index++)
        if (!rules[index].is_done && rules[index].place == place) return 1;
    return 0;
}

/* Before bytes go over a socket: whether the call fails. */
static int on_socket(enum place place, int fd, size_t bytes) {
    if (!has_place(place) || !is_socket(fd)) return 0;
    pthread_mutex_lock(&lock);
    int rule = due_on_socket(place, fd, bytes);
    pthread_mutex_unlock(&lock);
    if (rule < 0) return 0;
    if (rules[rule].fails) return 1;
    stand_still();
    return 0;
}

ssize_t write(int fd, const void *bytes, size_t length) {
    ssize_t (*real)(int, const void *, size_t) = REAL(write);
    if (has_place(WRITTEN)) {
        pthread_mutex_lock(&lock);
        int rule = due(WRITTEN, fd, bytes, length);
        pthread_mutex_unlock(&lock);
        if (rule >= 0) {
            if (rules[rule].fails) {
                errno = ENOSPC;
                return -1;
            }
            ssize_t half = real(fd, bytes, length > 1 ? length / 2 : length);
            stand_still();
            return half;
        }
    }
    if (has_place(SYNCED)) {
        pthread_mutex_lock(&lock);
        for (int index = 0; index < rule_count; index++) {
            struct rule *rule = &rules[index];
            if (!rule->is_done && rule->place == SYNCED && is_file(fd, rule->file))
                rule->pending = memmem(bytes, length, rule->text, strlen(rule->text)) ? fd : -1;
        }
        pthread_mutex_unlock(&lock);
    }
    return real(fd, bytes, length);
}

static int synced(int fd, int (*real)(int)) {
    int result = real(fd), found = -1;
    if (!has_place(SYNCED)) return result;
    pthread_mutex_lock(&lock);
    for (int index = 0; index < rule_count && found < 0; index++) {
        struct rule *rule = &rules[index];
        if (rule->is_done || rule->place != SYNCED || rule->pending != fd) continue;
        rule->pending = -1;
        if (++rule->seen == rule->number && claims(index)) found = index;
    }
    pthread_mutex_unlock(&lock);
    if (found >= 0 && rules[found].fails) {
        errno = EIO;
        return -1;
    }
    if (found >= 0) stand_still();
    return result;
}

int fsync(int fd) { return synced(fd, REAL(fsync)); }

int fdatasync(int fd) { return synced(fd, REAL(fdatasync)); }

ssize_t pread64(int fd, void *bytes, size_t length, off64_t offset) {
    if (has_place(READ)) {
        pthread_mutex_lock(&lock);
        int rule = due(READ, fd, NULL, 0);
        pthread_mutex_unlock(&lock);
        if (rule >= 0 && rules[rule].fails) {
            errno = EIO;
            return -1;
        }
        if (rule >= 0) stand_still();
    }
    return REAL(pread64)(fd, bytes, length, offset);
}

ssize_t send(int fd, const void *bytes, size_t length, int flags) {
    if (on_socket(SENT, fd, length)) {
        errno = ECONNRESET;
        return -1;
    }
    return REAL(send)(fd, bytes, length, flags);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    size_t length = 0;
    for (int part = 0; part < count; part++) length += parts[part].iov_len;
    if (on_socket(SENT, fd, length)) {
        errno = ECONNRESET;
        return -1;
    }
    return REAL(writev)(fd, parts, count);
}

ssize_t recv(int fd, void *bytes, size_t length, int flags) {
    ssize_t got = REAL(recv)(fd, bytes, length, flags);
    if (got > 0 && on_socket(RECEIVED, fd, (size_t)got)) {
        errno = ECONNRESET;
        return -1;
    }
    return got;
}

int close(int fd) {
    if (fd >= 0 && fd < MOST_FILES) moved[0][fd] = moved[1][fd] = 0;
    return REAL(close)(fd);
}
