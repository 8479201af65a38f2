"""What the cores use of the system: threads, atomics, clock, epoll, sockets. Declarations only."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from posix.uio cimport iovec


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef struct pthread_condattr_t:
        pass
    ctypedef unsigned long pthread_t

    int pthread_mutex_init(pthread_mutex_t*, void*)
    int pthread_mutex_destroy(pthread_mutex_t*)
    int pthread_mutex_lock(pthread_mutex_t*)
    int pthread_mutex_trylock(pthread_mutex_t*)
    int pthread_mutex_unlock(pthread_mutex_t*)
    int pthread_cond_init(pthread_cond_t*, pthread_condattr_t*)
    int pthread_cond_destroy(pthread_cond_t*)
    int pthread_cond_wait(pthread_cond_t*, pthread_mutex_t*)
    int pthread_cond_timedwait(pthread_cond_t*, pthread_mutex_t*, timespec*)
    int pthread_cond_signal(pthread_cond_t*)
    int pthread_cond_broadcast(pthread_cond_t*)
    int pthread_condattr_init(pthread_condattr_t*)
    int pthread_condattr_destroy(pthread_condattr_t*)
    int pthread_condattr_setclock(pthread_condattr_t*, int)
    int pthread_atfork(void () noexcept nogil, void () noexcept nogil, void () noexcept nogil)
    int pthread_create(pthread_t*, void*, void* (*)(void*) noexcept nogil, void*)
    int pthread_join(pthread_t, void**)
    int pthread_setname_np(pthread_t, const char*)      # at most 15 characters

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    ctypedef long time_t
    int clock_gettime(int, timespec*)
    time_t time(time_t*)
    enum: CLOCK_MONOTONIC

cdef extern from "<errno.h>" nogil:
    """
    #define system_set_errno(value) (errno = (value))
    """
    int errno
    void set_errno "system_set_errno"(int)
    enum:
        EAGAIN      # EWOULDBLOCK is the same on Linux
        ECONNRESET
        EINTR
        EMFILE
        ENFILE
        ENOBUFS
        ENOMEM
        ENOTCONN
        EPIPE
        EPROTO
        ESHUTDOWN

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    int sigfillset(sigset_t*)
    int pthread_sigmask(int, sigset_t*, sigset_t*)
    enum: SIG_SETMASK

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        void* ptr
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int)
    int epoll_ctl(int, int, int, epoll_event*)
    int epoll_wait(int, epoll_event*, int, int)
    enum:
        EPOLL_CLOEXEC
        EPOLL_CTL_ADD
        EPOLL_CTL_DEL
    # Unsigned 32-bit in <sys/epoll.h> (EPOLLET is bit 31).
    const uint32_t EPOLLIN
    const uint32_t EPOLLOUT
    const uint32_t EPOLLRDHUP
    const uint32_t EPOLLHUP
    const uint32_t EPOLLERR
    const uint32_t EPOLLET

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int, int)
    enum:
        EFD_CLOEXEC
        EFD_NONBLOCK

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd*, unsigned long, int)
    enum: POLLIN

cdef extern from "<sys/timerfd.h>" nogil:
    struct itimerspec:
        timespec it_interval
        timespec it_value
    int timerfd_create(int, int)
    int timerfd_settime(int, int, const itimerspec*, itimerspec*)
    enum: TFD_CLOEXEC

cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    struct msghdr:
        iovec* msg_iov
        size_t msg_iovlen
    struct sockaddr:
        pass
    struct sockaddr_storage:
        pass
    int socket(int, int, int)
    int accept4(int, sockaddr*, socklen_t*, int)
    int connect(int, const sockaddr*, socklen_t)
    int shutdown(int, int)
    ssize_t sendmsg(int, const msghdr*, int)
    ssize_t send(int, const void*, size_t, int)
    ssize_t recv(int, void*, size_t, int)
    int getsockopt(int, int, int, void*, socklen_t*)
    int setsockopt(int, int, int, const void*, socklen_t)
    enum:
        AF_INET
        MSG_NOSIGNAL
        MSG_DONTWAIT
        MSG_PEEK
        MSG_TRUNC       # of a TCP socket: throw away what is read
        SOL_SOCKET
        SO_SNDBUF
        SOCK_CLOEXEC
        SOCK_NONBLOCK
        SOCK_STREAM
        SHUT_RDWR
        SHUT_WR

cdef extern from "<sys/mman.h>" nogil:
    void* mmap(void*, size_t, int, int, int, long)
    int munmap(void*, size_t)
    int madvise(void*, size_t, int)
    void* MAP_FAILED
    enum:
        MADV_HUGEPAGE
        MADV_NOHUGEPAGE
        MAP_ANONYMOUS
        MAP_NORESERVE
        MAP_PRIVATE
        PROT_READ
        PROT_WRITE

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<netinet/in.h>" nogil:
    enum: IPPROTO_TCP

cdef extern from "<netinet/tcp.h>" nogil:
    struct tcp_info:
        uint8_t tcpi_probes             # zero-window or keepalive probes not answered
        uint32_t tcpi_unacked           # segments
        uint32_t tcpi_last_data_sent    # ms ago
        uint32_t tcpi_last_ack_recv     # ms ago
        uint32_t tcpi_rtt               # us
    enum: TCP_INFO

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int, void*, size_t)
    ssize_t write(int, const void*, size_t)
    int close(int)

# Sequentially consistent throughout: the only contended ones are a flag per sleep of the
# loop and a list head per hand-over, where the cheaper orders would save nothing measurable.
cdef extern from * nogil:
    """
    #define sync_load(p) __atomic_load_n((p), __ATOMIC_SEQ_CST)
    #define sync_store(p, v) __atomic_store_n((p), (v), __ATOMIC_SEQ_CST)
    #define sync_swap(p, v) __atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST)
    #define sync_add(p, v) __atomic_add_fetch((p), (v), __ATOMIC_SEQ_CST)
    #define sync_cas(p, expected, v) \\
        __atomic_compare_exchange_n((p), (expected), (v), 1, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)
    """
    int load_int "sync_load"(int*)
    void store_int "sync_store"(int*, int)
    int swap_int "sync_swap"(int*, int)
    int add_int "sync_add"(int*, int)
    int64_t load_i64 "sync_load"(int64_t*)
    int64_t add_i64 "sync_add"(int64_t*, int64_t)

# A list that any thread pushes onto and one thread takes whole, the newest first: nothing is ever
# popped off it singly, so there is no ABA. It is a pointer to its first item, and each item has a
# pointer to the next in a field of its own.
cdef extern from * nogil:
    """
    /* Of any struct: a pointer to it may be read and written as one to nothing in particular. */
    typedef void *__attribute__((may_alias)) sync_link;
    static inline void sync_list_push(void *list, void *next, void *item) {
        sync_link *first = (sync_link *)list, *link = (sync_link *)next;
        void *second = sync_load(first);
        do {
            *link = second;
        } while (!sync_cas(first, &second, item));
    }
    #define sync_list_take(list) sync_swap((sync_link *)(list), NULL)
    #define sync_list_is_empty(list) (sync_load((sync_link *)(list)) == NULL)
    """
    # Arguments: where the list begins, the item's field for the next one, the item.
    void list_push "sync_list_push"(void*, void*, void*)
    void* list_take "sync_list_take"(void*)
    bint list_is_empty "sync_list_is_empty"(void*)

# Of counters, and of states, that one thread at a time changes, while others look at them: no more
# is promised than that each is read whole.
cdef extern from * nogil:
    """
    #define sync_count_get(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    #define sync_count_set(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
    #define sync_count_add(p, v) sync_count_set((p), sync_count_get(p) + (uint64_t)(v))
    """
    uint64_t count_get "sync_count_get"(uint64_t*)
    void count_set "sync_count_set"(uint64_t*, uint64_t)
    void count_add "sync_count_add"(uint64_t*, int)
    int get_int "sync_count_get"(int*)
    void note_int "sync_count_set"(int*, int)

cdef extern from * nogil:
    """
    #include <stdio.h>
    #include <time.h>
    static inline size_t format_http_date(char *out, size_t room, time_t now) {
        /* Not strftime: its names follow the locale. */
        static const char days[] = "SunMonTueWedThuFriSat";
        static const char months[] = "JanFebMarAprMayJunJulAugSepOctNovDec";
        struct tm t;
        int n;
        gmtime_r(&now, &t);
        n = snprintf(out, room, "%.3s, %02d %.3s %d %02d:%02d:%02d GMT", days + 3 * t.tm_wday,
                     t.tm_mday, months + 3 * t.tm_mon, t.tm_year + 1900, t.tm_hour, t.tm_min,
                     t.tm_sec);
        return n > 0 && (size_t)n < room ? (size_t)n : 0;
    }
    """
    size_t format_http_date(char* out, size_t room, time_t now)

cdef extern from * nogil:
    """
    #include <assert.h>
    #ifdef NDEBUG
    #define sync_invariant(holds) ((void)(holds))
    #else
    #define sync_invariant(holds) assert(holds)
    #endif
    """
    # Checked in debug and sanitizer builds, which undefine NDEBUG (setup.py).
    void invariant "sync_invariant"(bint)


cdef inline int thread_start(pthread_t* thread, void* (*run)(void*) noexcept nogil,
                             void* argument, const char* name) noexcept nogil:
    """Start a thread with all signals blocked: they belong to Python's threads; 0 or an errno.

    ``name`` is what ``top`` shows, at most 15 characters.
    """
    cdef sigset_t all_signals, before
    cdef int rc
    sigfillset(&all_signals)
    pthread_sigmask(SIG_SETMASK, &all_signals, &before)
    rc = pthread_create(thread, NULL, run, argument)
    if rc == 0:
        pthread_setname_np(thread[0], name)
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    return rc


cdef inline int64_t clock_ns() noexcept nogil:
    """Monotonic time in nanoseconds."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef inline timespec deadline_timespec(int64_t deadline_ns) noexcept nogil:
    """A monotonic deadline as ``pthread_cond_timedwait`` takes it."""
    cdef timespec at
    at.tv_sec = <long>(deadline_ns // 1000000000)
    at.tv_nsec = <long>(deadline_ns % 1000000000)
    return at


cdef inline int cond_init_monotonic(pthread_cond_t* cond) noexcept nogil:
    """A condition whose timed waits follow CLOCK_MONOTONIC; 0 or an errno."""
    cdef pthread_condattr_t attr
    cdef int rc = pthread_condattr_init(&attr)
    if rc != 0:
        return rc
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC)
    rc = pthread_cond_init(cond, &attr)
    pthread_condattr_destroy(&attr)
    return rc
