/* "Bare C": the exchange of a pipeline and nothing else; the reference of P1 and P4, and as
 * bare_sender-tls, over mutual TLS, of T1, T3 and T4.
 *
 * One epoll thread, N connections, one request outstanding on each; or N blocking threads with one
 * connection each. Every request is one writev
 * of a head like ours (spec 2.6) and a body of --size bytes; every answer must be a 204 that
 * passes the checks of `is_204`. No queue, no encoding, no statistics, no timeouts.
 *
 * usage: bare_sender --port P [--connections 4] [--size 172] [--messages N | --seconds S]
 *                    [--warmup 1000] [--spin | --lone | --threads | --times] [--body FILE]
 *        bare_sender-tls --cert FILE --ca FILE ...: the same, with a key beside the certificate
 *   --spin    a second thread computes all the time, as the main thread of P4's subjects does
 *   --lone    a second thread offers one of N messages every 2 ms by writing to an eventfd on which
 *             the loop sleeps: what waking a thread costs on this machine (reference of P5, P10)
 *   --threads a blocking thread for each connection instead of the epoll loop
 *   --times   how long each exchange took, from the first write to the whole answer: exchange_ns
 *   --pause   so many microseconds before each exchange; with one connection a lone message
 *   --body    the bytes of FILE instead of --size x: then it is a load for receivers
 *   stdout    one JSON object; CPU is that of the exchanging threads after the warm-up;
 *             with --lone send_ns (time in write) and offers_ns (CLOCK_REALTIME) of each message
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "peak.h"
#include "spin.h"
#include "wire.h"

enum {
    CONNECTIONS_CAP = 1024,
    ANSWER_CAP = 4096,
    /* A large body is written in steps of this size: smaller ones cost more CPU on loopback,
     * larger ones keep the other connections waiting (design.md section 2). */
    STEP_CAP = 1024 * 1024,
    CLOCK_EVERY = 64, /* turns of the loop between two looks at the clock */
    LONE_PAUSE_NS = 2000000,
};
static const double THREADS_WARMUP_S = 0.2;

typedef struct {
    wire_t wire;
    size_t written; /* of head and body of the request in hand */
    size_t got;     /* of the answer */
    int64_t begun_ns; /* with --times, when the request in hand was begun */
    bool wants_out; /* registered for EPOLLOUT */
    char answer[ANSWER_CAP];
} conn_t;

static char head[1024];
static size_t head_len, size = 172;
static char *body;

static void read_body(const char *path);
static int epoll, wakefd = -1;
static int64_t *send_ns, *offers_ns; /* with --lone, one of each per message */
static uint64_t lone_messages;
static int64_t *exchange_ns; /* with --times, one per message after the warm-up */
static _Atomic uint64_t answered;
static _Atomic bool stopping;

static long pause_us;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void read_body(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END))
        die(path);
    size = (size_t)ftell(file);
    rewind(file);
    body = malloc(size ? size : 1);
    if (!body || fread(body, 1, size, file) != size)
        die(path);
    fclose(file);
}

static int64_t clock_ns(clockid_t clock)
{
    struct timespec ts;
    clock_gettime(clock, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

static double now_s(void)
{
    return (double)clock_ns(CLOCK_MONOTONIC) / 1e9;
}

/* CPU of this thread (RUSAGE_THREAD: a spinning one is not counted) or of all, in seconds. */
static double cpu_s(int who)
{
    struct rusage ru;
    getrusage(who, &ru);
    return (double)(ru.ru_utime.tv_sec + ru.ru_stime.tv_sec) +
           (double)(ru.ru_utime.tv_usec + ru.ru_stime.tv_usec) / 1e6;
}

/* Offers a message every LONE_PAUSE_NS, or later if the last one is not answered by then. */
static void *offer_lone(void *unused)
{
    static const uint64_t one = 1;
    for (uint64_t i = 0; i < lone_messages; i++) {
        do
            nanosleep(&(struct timespec){0, LONE_PAUSE_NS}, NULL);
        while (atomic_load(&answered) < i);
        offers_ns[i] = clock_ns(CLOCK_REALTIME);
        int64_t start_ns = clock_ns(CLOCK_MONOTONIC);
        if (write(wakefd, &one, sizeof one) != sizeof one)
            die("eventfd");
        send_ns[i] = clock_ns(CLOCK_MONOTONIC) - start_ns;
    }
    return unused;
}

static void print_list(const char *name, const int64_t *values, uint64_t n)
{
    printf("\"%s\": [", name);
    for (uint64_t i = 0; i < n; i++)
        printf("%s%lld", i ? ", " : "", (long long)values[i]);
    printf("]");
}

static void watch(conn_t *c, int op, uint32_t events)
{
    struct epoll_event ev = {.events = events, .data.ptr = c};
    if (epoll_ctl(epoll, op, c->wire.fd, &ev))
        die("epoll_ctl");
}

/* Writes one step of the request in hand; the rest when the socket takes more. */
static void write_step(conn_t *c)
{
    struct iovec iov[2];
    int n_iov = 0;
    size_t room = STEP_CAP, done = c->written;
    if (done < head_len) {
        iov[n_iov++] = (struct iovec){head + done, head_len - done};
        room -= head_len - done;
        done = head_len;
    }
    size_t left = head_len + size - done;
    if (left)
        iov[n_iov++] = (struct iovec){body + (done - head_len), left < room ? left : room};
    ssize_t n = wire_write(&c->wire, iov, n_iov);
    if (n < 0 && errno != EAGAIN)
        die("writev");
    if (n > 0)
        c->written += (size_t)n;
    bool unfinished = c->written < head_len + size;
    if (unfinished != c->wants_out) {
        c->wants_out = unfinished;
        watch(c, EPOLL_CTL_MOD, unfinished ? EPOLLIN | EPOLLOUT : EPOLLIN);
    }
}

/* A whole 204 without a body: its status, and no header that changes where it ends. */
static bool is_204(const char *p, size_t len)
{
    const char *end = p + len;
    if (len < 17 || memcmp(p, "HTTP/1.1 204 ", 13) != 0 || memcmp(end - 4, "\r\n\r\n", 4) != 0)
        return false;
    while ((p = memchr(p, '\n', (size_t)(end - p))) && ++p < end - 2) {
        const char *colon = memchr(p, ':', (size_t)(end - p));
        if (!colon)
            return false;
        size_t n = (size_t)(colon - p);
        if ((n == 14 && strncasecmp(p, "content-length", n) == 0) ||
            (n == 17 && strncasecmp(p, "transfer-encoding", n) == 0) ||
            (n == 10 && strncasecmp(p, "connection", n) == 0))
            return false;
    }
    return true;
}

/* True when the answer is complete. */
static bool read_answer(conn_t *c)
{
    do {
        ssize_t n = wire_read(&c->wire, c->answer + c->got, ANSWER_CAP - c->got);
        if (n < 0 && errno == EAGAIN)
            return false;
        if (n <= 0)
            die("recv");
        c->got += (size_t)n;
    } while (wire_holds_bytes(&c->wire) && c->got < ANSWER_CAP);
    if (c->got < 4 || memcmp(c->answer + c->got - 4, "\r\n\r\n", 4) != 0) {
        if (c->got == ANSWER_CAP)
            die("answer too long");
        return false;
    }
    if (c->written < head_len + size || !is_204(c->answer, c->got)) {
        fprintf(stderr, "not a 204: %.*s\n", (int)c->got, c->answer);
        exit(1);
    }
    return true;
}

/* A new request on an idle connection. */
static void begin(conn_t *c)
{
    c->written = c->got = 0;
    if (pause_us)
        nanosleep(&(struct timespec){0, pause_us * 1000}, NULL);
    if (exchange_ns)
        c->begun_ns = clock_ns(CLOCK_MONOTONIC);
    write_step(c);
}

static void connect_to(conn_t *c, int port)
{
    struct sockaddr_in addr = {.sin_family = AF_INET,
                               .sin_port = htons((uint16_t)port),
                               .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int on = 1, half = 512 * 1024;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&addr, sizeof addr) ||
        !wire_begin(&c->wire, fd, false))
        die("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    /* 1 MiB: as ours to a near peer (pipeline/send/_worker.pxd). */
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &half, sizeof half);
}

/* One of the blocking threads: exchanges until it is told to stop. */
static void *exchange(void *argument)
{
    conn_t *c = argument;
    while (!atomic_load(&stopping)) {
        c->written = c->got = 0;
        while (c->written < head_len + size) {
            struct iovec iov[2] = {{head, head_len}, {body, size}};
            struct iovec rest = {body + (c->written - head_len), head_len + size - c->written};
            bool is_begun = c->written >= head_len;
            ssize_t n = wire_write(&c->wire, is_begun ? &rest : iov, is_begun ? 1 : 2);
            if (n < 0 || (c->written + (size_t)n < head_len))
                die("writev");
            c->written += (size_t)n;
        }
        while (!read_answer(c))
            ;
        atomic_fetch_add(&answered, 1);
    }
    return NULL;
}

/* What has been answered, and what CPU has been used, so far. */
typedef struct {
    double at_s, cpu_s;
    uint64_t answered;
} moment_t;

static moment_t moment_after(double seconds)
{
    nanosleep(&(struct timespec){(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)}, NULL);
    return (moment_t){now_s(), cpu_s(RUSAGE_SELF), atomic_load(&answered)};
}

static void print_result(uint64_t messages, double took_s, double took_cpu_s, uint64_t total)
{
    printf("{\"messages\": %llu, \"seconds\": %.6f, \"messages_per_s\": %.1f, "
           "\"cpu_us_per_message\": %.4f, \"peak_kib\": %ld, ",
           (unsigned long long)messages, took_s, (double)messages / took_s,
           took_cpu_s * 1e6 / (double)messages, peak_kib());
    if (exchange_ns) {
        print_list("exchange_ns", exchange_ns, messages);
        printf(", ");
    }
    printf("\"total\": %llu}\n", (unsigned long long)total);
}

static int run_threads(conn_t *conns, int connections, double seconds)
{
    pthread_t threads[CONNECTIONS_CAP];
    for (int i = 0; i < connections; i++)
        if (pthread_create(&threads[i], NULL, exchange, &conns[i]))
            die("pthread_create");
    moment_t start = moment_after(THREADS_WARMUP_S), end = moment_after(seconds);
    atomic_store(&stopping, true);
    for (int i = 0; i < connections; i++)
        pthread_join(threads[i], NULL);
    print_result(end.answered - start.answered, end.at_s - start.at_s, end.cpu_s - start.cpu_s,
                 atomic_load(&answered));
    return 0;
}

int main(int argc, char **argv)
{
    int port = 0, connections = 4, option;
    uint64_t messages = 0, warmup = 1000;
    double seconds = 0;
    bool spinning = false, lone = false, threaded = false, times = false;
    static const struct option options[] = {
        {"port", required_argument, 0, 'p'},     {"connections", required_argument, 0, 'c'},
        {"size", required_argument, 0, 'z'},     {"messages", required_argument, 0, 'm'},
        {"seconds", required_argument, 0, 's'},  {"warmup", required_argument, 0, 'w'},
        {"spin", no_argument, 0, 'x'},           {"lone", no_argument, 0, 'l'},
        {"body", required_argument, 0, 'b'},     {"threads", no_argument, 0, 't'},
        {"times", no_argument, 0, 'e'},         {"pause", required_argument, 0, 'u'},
#ifdef TLS
        {"cert", required_argument, 0, 'C'},     {"ca", required_argument, 0, 'A'},
#endif
        {0, 0, 0, 0},
    };
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (option) {
        case 'p': port = atoi(optarg); break;
        case 'c': connections = atoi(optarg); break;
        case 'z': size = strtoul(optarg, NULL, 10); break;
        case 'm': messages = strtoull(optarg, NULL, 10); break;
        case 's': seconds = atof(optarg); break;
        case 'w': warmup = strtoull(optarg, NULL, 10); break;
        case 'x': spinning = true; break;
        case 'l': lone = true; break;
        case 'b': read_body(optarg); break;
        case 't': threaded = true; break;
        case 'e': times = true; break;
        case 'u': pause_us = atol(optarg); break;
#ifdef TLS
        case 'C': cert_file = optarg; break;
        case 'A': ca_file = optarg; break;
#endif
        default: return 2;
        }
    }
    if (port <= 0 || connections < 1 || connections > CONNECTIONS_CAP ||
        !messages == !(seconds > 0) || ((lone || times) && !messages) || (threaded && messages)) {
        fprintf(stderr,
                "bare_sender: needs --port, 1 to %d --connections, and --messages or --seconds\n"
                "(--lone and --times: --messages; --threads: --seconds)\n",
                CONNECTIONS_CAP);
        return 2;
    }
    head_len = (size_t)snprintf(head, sizeof head,
                                "POST /raft HTTP/1.1\r\n"
                                "Host: 127.0.0.1:%d\r\n"
                                "User-Agent: raft-pipeline/0.1.0\r\n"
                                "Content-Type: application/protobuf\r\n"
                                "X-Etcd-Cluster-Id: cdf818194e3a8c32\r\n"
                                "X-Min-Cluster-Version: 3.0.0\r\n"
                                "X-Server-From: 8e9e05c52164694d\r\n"
                                "X-Server-Version: 3.5.1\r\n"
                                "Accept-Encoding: identity\r\n"
                                "Content-Length: %zu\r\n\r\n",
                                port, size);
    conn_t *conns = calloc((size_t)connections, sizeof *conns);
    if (!body && (body = malloc(size ? size : 1)))
        memset(body, 'x', size);
    if (!conns || !body)
        die("malloc");
    if (!wire_setup(false))
        return 2;
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0)
        die("epoll_create1");
    for (int i = 0; i < connections; i++)
        connect_to(&conns[i], port);
    if (threaded)
        return run_threads(conns, connections, seconds);
    if (times && !(exchange_ns = calloc(messages, sizeof *exchange_ns)))
        die("calloc");
    for (int i = 0; i < connections; i++) {
        if (fcntl(conns[i].wire.fd, F_SETFL, O_NONBLOCK)) /* connect may wait, the loop must not */
            die("fcntl");
        watch(&conns[i], EPOLL_CTL_ADD, EPOLLIN);
    }
    uint64_t limit = messages ? warmup + messages : UINT64_MAX, begun = 0, done = 0;
    pthread_t thread;
    if (lone) {
        lone_messages = limit = messages;
        send_ns = calloc(messages, sizeof *send_ns);
        offers_ns = calloc(messages, sizeof *offers_ns);
        wakefd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        struct epoll_event ev = {.events = EPOLLIN | EPOLLET, .data.ptr = NULL};
        if (!send_ns || !offers_ns || wakefd < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, wakefd, &ev) ||
            pthread_create(&thread, NULL, offer_lone, NULL))
            die("--lone");
    } else if (spinning && !start_spinning()) {
        die("pthread_create");
    }
    double start_s = now_s(), start_cpu_s = cpu_s(RUSAGE_THREAD);
    for (; !lone && begun < (uint64_t)connections && begun < limit; begun++)
        begin(&conns[begun]);

    for (unsigned turn = 1; done < (lone ? limit : begun); turn++) {
        struct epoll_event events[CONNECTIONS_CAP];
        int n = epoll_wait(epoll, events, CONNECTIONS_CAP, -1);
        if (n < 0 && errno != EINTR)
            die("epoll_wait");
        if (seconds > 0 && done >= warmup && turn % CLOCK_EVERY == 0 && now_s() - start_s >= seconds)
            limit = begun; /* no new requests; the outstanding ones are awaited */
        for (int i = 0; i < n; i++) {
            conn_t *c = events[i].data.ptr;
            if (!c) { /* an offer, never read: each write to the eventfd is an edge */
                begun++;
                begin(conns);
                continue;
            }
            if (events[i].events & EPOLLOUT)
                write_step(c);
            if (!(events[i].events & ~(uint32_t)EPOLLOUT) || !read_answer(c))
                continue;
            if (exchange_ns && done >= warmup)
                exchange_ns[done - warmup] = clock_ns(CLOCK_MONOTONIC) - c->begun_ns;
            if (++done == warmup) {
                start_s = now_s();
                start_cpu_s = cpu_s(RUSAGE_THREAD);
            }
            if (lone)
                atomic_store(&answered, done);
            else if (begun < limit) {
                begun++;
                begin(c);
            }
        }
    }
    if (lone) {
        pthread_join(thread, NULL);
        printf("{");
        print_list("send_ns", send_ns, lone_messages);
        printf(", ");
        print_list("offers_ns", offers_ns, lone_messages);
        printf(", \"total\": %llu}\n", (unsigned long long)done);
        return 0;
    }
    double took_s = now_s() - start_s, took_cpu_s = cpu_s(RUSAGE_THREAD) - start_cpu_s;
    print_result(done - warmup, took_s, took_cpu_s, done);
    return 0;
}
