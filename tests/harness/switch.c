/* A network between namespaces, as bad as it is told to be: one TUN device in each, and packets carried from one to the other,
 * late or not at all. In place of `tc netem`, which not every kernel has; chance comes from a seed.
 *
 * switch SEED NAMESPACE...    the namespace number k (from 1) has the address 127.77.0.k on its device `v0`
 *
 * Lines on standard input, each answered by `ok FORWARDED DROPPED` (packets so far):
 *
 *   K LOSS DELAY    packets to and from number K are lost LOSS times in 1000, and take DELAY milliseconds
 *
 * It ends with its standard input.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

enum { MOST_HOSTS = 8, MOST_PACKETS = 8192, LONGEST = 2048 };

struct packet {
    int64_t due;
    int to, length;
    struct packet *next;
    unsigned char bytes[LONGEST];
};

static int device[MOST_HOSTS + 1], hosts;
static long loss[MOST_HOSTS + 1], delay[MOST_HOSTS + 1];
static struct packet *first;
static long queued, forwarded, dropped;
static uint64_t chance;

static void fail(const char *what) {
    fprintf(stderr, "switch: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

static int is_lost(long per_thousand) {
    chance ^= chance << 13;
    chance ^= chance >> 7;
    chance ^= chance << 17;
    return (long)(chance % 1000) < per_thousand;
}

static int open_device(const char *namespace) {
    char path[256];
    snprintf(path, sizeof path, "/var/run/netns/%s", namespace);
    int place = open(path, O_RDONLY | O_CLOEXEC);
    if (place < 0 || setns(place, CLONE_NEWNET)) fail(path);
    close(place);
    int tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    strcpy(request.ifr_name, "v0");
    if (tun < 0 || ioctl(tun, TUNSETIFF, &request)) fail("/dev/net/tun");
    return tun;
}

/* Takes a packet that number `from` sent. */
static void take(int from, const unsigned char *bytes, int length) {
    int is_ours = length >= 20 && bytes[0] >> 4 == 4 && bytes[16] == 127 && bytes[17] == 77 && bytes[18] == 0;
    int to = is_ours ? bytes[19] : 0;
    if (to < 1 || to > hosts) return;
    if (is_lost(loss[from]) || is_lost(loss[to]) || queued == MOST_PACKETS) {
        dropped++;
        return;
    }
    struct packet *packet = malloc(sizeof *packet);
    if (!packet) fail("malloc");
    packet->due = now() + delay[from] + delay[to];
    packet->to = to;
    packet->length = length;
    memcpy(packet->bytes, bytes, (size_t)length);
    struct packet **at = &first;
    while (*at && (*at)->due <= packet->due) at = &(*at)->next;
    packet->next = *at;
    *at = packet;
    queued++;
}

static void deliver(void) {
    while (first && first->due <= now()) {
        struct packet *packet = first;
        first = packet->next;
        queued--;
        if (write(device[packet->to], packet->bytes, (size_t)packet->length) == packet->length) forwarded++;
        else dropped++;
        free(packet);
    }
}

int main(int count, char **given) {
    if (count < 3 || count - 2 > MOST_HOSTS) fail("SEED NAMESPACE...");
    chance = strtoull(given[1], NULL, 10) * 2 + 1;
    hosts = count - 2;
    struct pollfd polled[MOST_HOSTS + 1] = {{.fd = 0, .events = POLLIN}};
    for (int host = 1; host <= hosts; host++) {
        device[host] = open_device(given[host + 1]);
        polled[host] = (struct pollfd){.fd = device[host], .events = POLLIN};
    }
    printf("ok 0 0\n");
    fflush(stdout);
    for (;;) {
        int64_t wait = first ? first->due - now() : 1000;
        if (poll(polled, (nfds_t)hosts + 1, wait < 0 ? 0 : (int)wait) < 0 && errno != EINTR) fail("poll");
        if (polled[0].revents) {
            char line[128];
            ssize_t length = read(0, line, sizeof line - 1);
            if (length <= 0) return 0;
            line[length] = 0;
            int host;
            long lost, late;
            if (sscanf(line, "%d %ld %ld", &host, &lost, &late) != 3 || host < 1 || host > hosts) fail(line);
            loss[host] = lost;
            delay[host] = late;
            printf("ok %ld %ld\n", forwarded, dropped);
            fflush(stdout);
        }
        for (int host = 1; host <= hosts; host++) {
            unsigned char bytes[LONGEST];
            ssize_t length;
            while ((length = read(device[host], bytes, sizeof bytes)) > 0) take(host, bytes, (int)length);
        }
        deliver();
    }
}
