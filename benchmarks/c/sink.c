/* The neutral sink: reads POSTs, throws the bodies away, answers 204; as sink-tls, over TLS.
 *
 * One epoll thread, HTTP/1.1 keep-alive, level-triggered. It knows just enough HTTP to find the
 * end of a request: a head of at most HEAD_CAP bytes and one Content-Length. A GET is answered 404
 * (a Transport probes its peers, etcd's dials streams). Anything else closes the connection. Both are
 * counted, so that a run that went wrong cannot pass for a good one.
 *
 * usage: sink [--stamp] [--close] [--spin]      sink-tls --cert FILE --ca FILE [--close] [--spin]
 *   stdout  "listening PORT" at the start; one JSON object at the end
 *   stdin   must be a pipe; its end is the order to stop
 *   --stamp records, for each request, when the kernel received the packet with its last byte
 *           (SO_TIMESTAMPNS, CLOCK_REALTIME). How soon this process is scheduled does not matter.
 *           0 stands for a packet that came before the kernel had begun to stamp.
 *   --close closes each connection with the first answer: every request comes by a new one
 *   --spin  a second thread computes all the time; its CPU is not in cpu_s
 *   --cert  the certificate and its key, --ca whoever signed the clients'
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "peak.h"
#include "spin.h"
#include "wire.h"

enum {
    HEAD_CAP = 16 * 1024,      /* etcd's heads are about 350 bytes */
    SCRATCH_CAP = 1024 * 1024, /* a body is read in steps of this size */
    EVENTS_CAP = 64,
    STAMPS_CAP = 1 << 16,
};

typedef struct {
    wire_t wire;
    bool has_shaken_hands;
    size_t head_len;    /* bytes of an unfinished head in `head` */
    uint64_t body_left; /* bytes of the body still to come; 0 while a head is read */
    char head[HEAD_CAP];
} conn_t;

/* What becomes of a connection after some of its bytes. */
typedef enum { GO_ON, DONE, BROKEN } feed_t;

static struct {
    uint64_t requests, body_bytes, connections, handshakes, gets, bad;
} counters;
static char scratch[SCRATCH_CAP];
static char answer[256];
static size_t answer_len;
static bool stamping, closing;
static int64_t *stamps_ns;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

/* The answer of etcd's pipelineHandler, with the date of the start: a constant for all subjects. */
static void make_answer(void)
{
    char date[64];
    time_t now = time(NULL);
    strftime(date, sizeof date, "%a, %d %b %Y %H:%M:%S GMT", gmtime(&now));
    answer_len = (size_t)snprintf(answer, sizeof answer,
                                  "HTTP/1.1 204 No Content\r\n"
                                  "X-Etcd-Cluster-Id: cdf818194e3a8c32\r\n"
                                  "%sDate: %s\r\n\r\n",
                                  closing ? "Connection: close\r\n" : "", date);
}

/* Content-Length of a head of `len` bytes that ends in CRLF CRLF; -1 if it is not a POST with one. */
static int64_t content_length(const char *head, size_t len)
{
    static const char name[] = "content-length:";
    const char *end = head + len, *line = memmem(head, len, "\r\n", 2);
    if (len < 5 || memcmp(head, "POST ", 5) != 0)
        return -1;
    while (line && line + 4 < end) {
        line += 2;
        if (strncasecmp(line, name, sizeof name - 1) == 0) {
            int64_t value = 0;
            const char *p = line + sizeof name - 1;
            while (*p == ' ')
                p++;
            if (*p < '0' || *p > '9')
                return -1;
            for (; *p >= '0' && *p <= '9'; p++) {
                if (value > INT64_MAX / 16)
                    return -1;
                value = value * 10 + (*p - '0');
            }
            return *p == '\r' ? value : -1;
        }
        line = memmem(line, (size_t)(end - line), "\r\n", 2);
    }
    return -1;
}

/* An answer to a client that has nothing outstanding: it fits, or the client is broken. */
static feed_t answer_with(conn_t *c, const char *bytes, size_t len)
{
    return wire_send(&c->wire, bytes, len) == (ssize_t)len ? GO_ON : BROKEN;
}

static feed_t refuse_get(conn_t *c)
{
    static const char refusal[] = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n";
    counters.gets++;
    return answer_with(c, refusal, sizeof refusal - 1);
}

static feed_t finish_request(conn_t *c, int64_t stamp_ns)
{
    if (stamping && counters.requests < STAMPS_CAP)
        stamps_ns[counters.requests] = stamp_ns;
    counters.requests++;
    feed_t answered = answer_with(c, answer, answer_len);
    return answered == GO_ON && closing ? DONE : answered;
}

/* Takes `len` bytes of the stream, which may end anywhere. */
static feed_t feed(conn_t *c, const char *data, size_t len, int64_t stamp_ns)
{
    feed_t outcome = GO_ON;
    while (len && outcome == GO_ON) {
        if (c->body_left) {
            size_t n = len < c->body_left ? len : (size_t)c->body_left;
            c->body_left -= n;
            counters.body_bytes += n;
            data += n;
            len -= n;
            if (!c->body_left)
                outcome = finish_request(c, stamp_ns);
            continue;
        }
        /* The head: copied, so that one that arrives in pieces needs no second way. */
        size_t old = c->head_len, room = HEAD_CAP - old, n = len < room ? len : room;
        memcpy(c->head + old, data, n);
        size_t from = old < 3 ? 0 : old - 3; /* the empty line may have begun in the last piece */
        char *end = memmem(c->head + from, old + n - from, "\r\n\r\n", 4);
        if (!end) {
            c->head_len = old + n;
            data += n;
            len -= n;
            if (c->head_len == HEAD_CAP)
                return BROKEN;
            continue;
        }
        size_t head_len = (size_t)(end + 4 - c->head);
        data += head_len - old;
        len -= head_len - old;
        c->head_len = 0;
        if (memcmp(c->head, "GET ", 4) == 0) {
            outcome = refuse_get(c);
            continue;
        }
        int64_t body_len = content_length(c->head, head_len);
        if (body_len < 0)
            return BROKEN;
        c->body_left = (uint64_t)body_len;
        if (!body_len)
            outcome = finish_request(c, stamp_ns);
    }
    return outcome;
}

/* A read, and with --stamp the kernel's time of arrival of the last packet read. */
static ssize_t receive(wire_t *w, int64_t *stamp_ns)
{
    if (!stamping)
        return wire_read(w, scratch, sizeof scratch);
    char control[CMSG_SPACE(sizeof(struct timespec))];
    struct iovec iov = {scratch, sizeof scratch};
    struct msghdr msg = {.msg_iov = &iov,
                         .msg_iovlen = 1,
                         .msg_control = control,
                         .msg_controllen = sizeof control};
    ssize_t n = recvmsg(w->fd, &msg, 0);
    for (struct cmsghdr *m = CMSG_FIRSTHDR(&msg); n > 0 && m; m = CMSG_NXTHDR(&msg, m)) {
        if (m->cmsg_level == SOL_SOCKET && m->cmsg_type == SCM_TIMESTAMPNS) {
            struct timespec ts;
            memcpy(&ts, CMSG_DATA(m), sizeof ts);
            *stamp_ns = (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
        }
    }
    return n;
}

static void accept_one(int listener, int epoll)
{
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), on = 1;
    if (fd < 0)
        return; /* the client has gone already */
    conn_t *c = calloc(1, sizeof *c);
    if (!c || !wire_begin(&c->wire, fd, true))
        die("no connection");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &ev))
        die("epoll_ctl");
    counters.connections++;
}

static void serve(conn_t *c)
{
    feed_t outcome;
    do {
        int64_t stamp_ns = 0;
        ssize_t n = receive(&c->wire, &stamp_ns);
        int error = errno;
        if (!c->has_shaken_hands && wire_has_shaken_hands(&c->wire)) {
            c->has_shaken_hands = true;
            counters.handshakes++;
        }
        if (n < 0 && (error == EAGAIN || error == EINTR))
            return;
        outcome = n > 0 ? feed(c, scratch, (size_t)n, stamp_ns) : DONE;
    } while (outcome == GO_ON && wire_holds_bytes(&c->wire));
    if (outcome == GO_ON)
        return;
    if (outcome == BROKEN)
        counters.bad++;
    wire_end(&c->wire);
    close(c->wire.fd);
    free(c);
}

static void print_counters(void)
{
    struct rusage ru;
    getrusage(RUSAGE_THREAD, &ru);
    double cpu_s = (double)(ru.ru_utime.tv_sec + ru.ru_stime.tv_sec) +
                   (double)(ru.ru_utime.tv_usec + ru.ru_stime.tv_usec) / 1e6;
    printf("{\"requests\": %llu, \"body_bytes\": %llu, \"connections\": %llu, "
           "\"handshakes\": %llu, \"gets\": %llu, "
           "\"bad\": %llu, \"cpu_s\": %.6f, \"peak_kib\": %ld, \"stamps_ns\": [",
           (unsigned long long)counters.requests, (unsigned long long)counters.body_bytes,
           (unsigned long long)counters.connections, (unsigned long long)counters.handshakes,
           (unsigned long long)counters.gets, (unsigned long long)counters.bad, cpu_s, peak_kib());
    for (uint64_t i = 0; stamping && i < counters.requests && i < STAMPS_CAP; i++)
        printf("%s%lld", i ? ", " : "", (long long)stamps_ns[i]);
    printf("]}\n");
}

int main(int argc, char **argv)
{
    bool spinning = false;
    int option;
    static const struct option options[] = {
        {"close", no_argument, 0, 'e'},       {"spin", no_argument, 0, 'x'},
#ifdef TLS
        {"cert", required_argument, 0, 'C'}, {"ca", required_argument, 0, 'A'},
#else
        {"stamp", no_argument, 0, 't'},
#endif
        {0, 0, 0, 0},
    };
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (option) {
        case 'e': closing = true; break;
        case 'x': spinning = true; break;
#ifdef TLS
        case 'C': cert_file = optarg; break;
        case 'A': ca_file = optarg; break;
#else
        case 't': stamping = true; break;
#endif
        default: return 2;
        }
    }
    if (!wire_setup(true))
        return 2;
    if (stamping && !(stamps_ns = calloc(STAMPS_CAP, sizeof *stamps_ns)))
        die("calloc");
    if (spinning && !start_spinning())
        die("pthread_create");
    make_answer();

    struct sockaddr_in addr = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t addr_len = sizeof addr;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    if (listener < 0 || epoll < 0 || bind(listener, (struct sockaddr *)&addr, sizeof addr) ||
        listen(listener, 1024) || getsockname(listener, (struct sockaddr *)&addr, &addr_len))
        die("listen");
    int on = 1; /* inherited by the connections */
    if (stamping && setsockopt(listener, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on))
        die("SO_TIMESTAMPNS");
    /* A conn_t pointer is never the address of one of these two. */
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = &listener};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &ev))
        die("epoll_ctl");
    ev.data.ptr = &epoll;
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, STDIN_FILENO, &ev))
        die("stdin must be a pipe");
    printf("listening %d\n", ntohs(addr.sin_port));
    fflush(stdout);

    for (;;) {
        struct epoll_event events[EVENTS_CAP];
        int n = epoll_wait(epoll, events, EVENTS_CAP, -1);
        if (n < 0 && errno != EINTR)
            die("epoll_wait");
        for (int i = 0; i < n; i++) {
            void *who = events[i].data.ptr;
            if (who == &listener) {
                accept_one(listener, epoll);
            } else if (who == &epoll) {
                if (read(STDIN_FILENO, scratch, sizeof scratch) <= 0) {
                    print_counters();
                    return 0;
                }
            } else {
                serve(who);
            }
        }
    }
}
