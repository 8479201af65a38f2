"""The I/O loop: one native thread that runs the workers of all pipes, and never takes the GIL.

It waits in ``epoll_wait`` for sockets, the next deadline, or an eventfd, which is written to only
while the loop sleeps. Who may touch what is told in ``_pipe.pxd``.
"""

from libc.stdint cimport int64_t
from libc.string cimport memset

from pipeline.send._channel cimport channel_take, job_t
from pipeline.send._pipe cimport (
    ERROR_STOPPED, EVENT_CLOSED, EVENT_FAILED, LOOP_EVENTS, SEND_BUFFER_NEAR, WORKER_IDLE,
    WORKER_PYTHON, WORKER_WRITING, loop_add_runnable, loop_queue_tasks, loop_t, loop_wake,
    pipe_check_age, pipe_expire, pipe_t, worker_t,
)
from pipeline.net._poll cimport poll_is_due, poll_timeout_ms, poll_wait
from pipeline.net._sync cimport (
    AF_INET, EAGAIN, EFD_CLOEXEC, EFD_NONBLOCK, EPOLLET, EPOLLIN, EPOLL_CLOEXEC, EPOLL_CTL_ADD,
    EPOLL_CTL_DEL, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET, SO_SNDBUF, clock_ns, close,
    cond_init_monotonic, epoll_create1, epoll_ctl, epoll_event, errno, eventfd, getsockopt,
    list_is_empty, list_take, load_i64, load_int, pthread_cond_destroy, pthread_join,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
    sched_yield, setsockopt, socket, socklen_t, store_int, thread_start,
)
from pipeline.send._worker cimport (
    worker_check_deadline, worker_look_at_state, worker_ready, worker_retire, worker_returned,
    worker_start, worker_to_python, worker_write,
)

cdef inline void loop_run_runnable(loop_t* loop) noexcept nogil:
    cdef worker_t* worker = loop.runnable
    cdef worker_t* following
    loop.runnable = loop.runnable_tail = NULL
    while worker is not NULL:
        following = worker.next_runnable
        worker.is_runnable = False
        if worker_look_at_state(worker) == WORKER_WRITING:
            worker_write(worker)
        worker = following


cdef inline void loop_forget_runnable(loop_t* loop, pipe_t* pipe) noexcept nogil:
    cdef worker_t* worker = loop.runnable
    cdef worker_t* following
    loop.runnable = loop.runnable_tail = NULL
    while worker is not NULL:
        following = worker.next_runnable
        worker.is_runnable = False
        if worker.pipe is not pipe:
            loop_add_runnable(loop, worker)
        worker = following


cdef inline void loop_close_idle(pipe_t* pipe) noexcept nogil:
    """Have idle connections of an earlier generation closed. The caller holds the lock."""
    cdef worker_t** link = &pipe.idle
    cdef worker_t* worker
    while link[0] is not NULL:
        worker = link[0]
        if worker.fd >= 0 and worker.generation != load_int(&pipe.generation):
            link[0] = worker.next
            worker_to_python(worker, EVENT_CLOSED, 0)
        else:
            link = &worker.next


cdef inline void loop_run_ready(loop_t* loop, pipe_t* pipe) noexcept nogil:
    """Start idle workers of pipes that were offered something."""
    cdef pipe_t* following
    cdef worker_t* worker
    cdef worker_t** link
    cdef job_t* job
    while pipe is not NULL:
        following = pipe.next_ready
        if not pipe.is_attached:
            pipe.is_attached = True
            pipe.next_attached = loop.attached
            loop.attached = pipe
        pthread_mutex_lock(&pipe.lock)
        pipe.is_scheduled = False
        pipe_expire(pipe, loop.poll.now_ns)
        link = &pipe.idle
        while link[0] is not NULL:
            worker = link[0]
            job = channel_take(&pipe.channel, worker.index > 0)
            if job is NULL:         # the first worker may find nothing where another does
                link = &worker.next
                continue
            link[0] = worker.next
            pthread_mutex_unlock(&pipe.lock)
            worker_start(worker, job, True)
            pthread_mutex_lock(&pipe.lock)
            link = &pipe.idle
        if pipe.is_retiring:
            pipe.is_retiring = False
            loop_close_idle(pipe)
        pthread_mutex_unlock(&pipe.lock)
        pipe = following


cdef inline void loop_run_returned(loop_t* loop) noexcept nogil:
    cdef worker_t* worker = <worker_t*>list_take(&loop.returned)
    cdef worker_t* following
    while worker is not NULL:
        following = worker.next
        worker_returned(worker)
        worker = following


cdef inline void loop_detach(loop_t* loop, pipe_t* pipe) noexcept nogil:
    """Forget a pipe that stops: idle workers retire, busy ones fail with ERROR_STOPPED."""
    cdef pipe_t** link = &loop.attached
    cdef worker_t* worker
    cdef int i, state
    if pipe.is_attached:
        while link[0] is not pipe:
            link = &link[0].next_attached
        link[0] = pipe.next_attached
    loop_forget_runnable(loop, pipe)
    pthread_mutex_lock(&pipe.lock)
    pipe.is_detached = True
    pipe.idle = NULL
    for i in range(pipe.n_workers):
        worker = &pipe.workers[i]
        state = worker_look_at_state(worker)
        if state == WORKER_PYTHON:
            continue        # it comes back to be retired: worker_give_back
        if state == WORKER_IDLE:
            if worker.is_registered:
                epoll_ctl(loop.poll.epfd, EPOLL_CTL_DEL, worker.fd, NULL)
                worker.is_registered = False
            worker_retire(worker)
        else:
            worker_to_python(worker, EVENT_FAILED, ERROR_STOPPED)
    pthread_mutex_unlock(&pipe.lock)


cdef inline void loop_check_deadlines(loop_t* loop) noexcept nogil:
    """Fail what is overdue and find the next deadline. Runs when one may have passed."""
    cdef pipe_t* pipe = loop.attached
    cdef int i
    loop.poll.next_deadline_ns = 0
    while pipe is not NULL:
        for i in range(pipe.n_workers):
            worker_check_deadline(&pipe.workers[i], loop.poll.now_ns)
        pipe_check_age(pipe, loop.poll.now_ns)
        pipe = pipe.next_attached


cdef inline void* loop_main(void* argument) noexcept nogil:
    """The thread. Ends when it is told to and no pipe is attached any more."""
    cdef loop_t* loop = <loop_t*>argument
    cdef epoll_event events[LOOP_EVENTS]
    cdef pipe_t* detached
    cdef pipe_t* following
    cdef int n, i, timeout_ms
    while True:
        # Detached is taken before ready and returned: what a pipe's owner pushed there before
        # it stopped the pipe is then seen before the pipe is forgotten.
        detached = <pipe_t*>list_take(&loop.detached)
        loop_run_returned(loop)
        loop_run_ready(loop, <pipe_t*>list_take(&loop.ready))
        while detached is not NULL:
            following = detached.next_detached
            loop_detach(loop, detached)
            detached = following
        if loop.runnable is not NULL:
            loop_run_runnable(loop)

        timeout_ms = 0
        if loop.runnable is NULL:
            timeout_ms = poll_timeout_ms(&loop.poll, loop.release_due_ns)
        if timeout_ms != 0:
            # Announce the sleep, then look once more: whoever pushed before saw us awake.
            store_int(&loop.poll.is_sleeping, 1)
            if not list_is_empty(&loop.ready) \
                    or not list_is_empty(&loop.returned) \
                    or not list_is_empty(&loop.detached) \
                    or load_int(&loop.is_stopping):
                timeout_ms = 0
        n = poll_wait(&loop.poll, events, LOOP_EVENTS, timeout_ms)
        for i in range(n):
            if events[i].data.ptr is not NULL:
                worker_ready(<worker_t*>events[i].data.ptr, events[i].events)
        if poll_is_due(&loop.poll):
            loop_check_deadlines(loop)
        if loop.release_due_ns and loop.poll.now_ns >= loop.release_due_ns:
            loop.release_due_ns = 0
            if load_i64(&loop.finished_jobs) > 0:       # a send may have been quicker
                loop_queue_tasks(loop)
        if load_int(&loop.is_stopping) and loop.attached is NULL \
                and list_is_empty(&loop.detached) \
                and list_is_empty(&loop.returned):
            return NULL


# -- making and ending, called from Python

cdef inline bint grants_near_buffer() noexcept nogil:
    """Whether a socket can have SEND_BUFFER_NEAR: net.core.wmem_max, which a container may hide.

    Older kernels have 208 KiB. A socket that got less than it asked for would be held at that.
    """
    cdef int size = SEND_BUFFER_NEAR // 2       # the kernel doubles it, for its own overhead
    cdef socklen_t length = sizeof(size)
    cdef int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)
    if fd < 0:
        return False
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size))
    getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, &length)
    close(fd)
    return size == SEND_BUFFER_NEAR


cdef inline int loop_init(loop_t* loop, int64_t queue_bytes) noexcept nogil:
    """Make a loop that is not running yet; 0 or an errno."""
    memset(loop, 0, sizeof(loop_t))
    loop.budget.limit = queue_bytes
    loop.has_near_buffer = grants_near_buffer()
    loop.poll.epfd = loop.poll.wakefd = -1
    if pthread_mutex_init(&loop.event_lock, NULL) != 0 \
            or cond_init_monotonic(&loop.event_cond) != 0:
        return EAGAIN
    return 0


cdef inline void loop_close_descriptors(loop_t* loop) noexcept nogil:
    if loop.poll.epfd >= 0:
        close(loop.poll.epfd)
    if loop.poll.wakefd >= 0:
        close(loop.poll.wakefd)
    loop.poll.epfd = loop.poll.wakefd = -1


cdef inline void loop_free(loop_t* loop) noexcept nogil:
    """Free what ``loop_init`` made; the thread has ended."""
    loop_close_descriptors(loop)
    pthread_cond_destroy(&loop.event_cond)
    pthread_mutex_destroy(&loop.event_lock)


cdef inline int loop_start(loop_t* loop) noexcept nogil:
    """Start the thread; 0 or an errno.

    The descriptors are made here and not before: processes that were forked in between, and start
    their copies of the loop, would share one epoll instance and be given each other's events.
    """
    cdef epoll_event event
    cdef int error
    loop.poll.now_ns = clock_ns()
    loop.poll.epfd = epoll_create1(EPOLL_CLOEXEC)
    if loop.poll.epfd >= 0:
        loop.poll.wakefd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    event.events = EPOLLIN | EPOLLET
    event.data.ptr = NULL
    if loop.poll.wakefd < 0 \
            or epoll_ctl(loop.poll.epfd, EPOLL_CTL_ADD, loop.poll.wakefd, &event) != 0:
        error = errno
    else:
        error = thread_start(&loop.thread, loop_main, loop, loop.name)
    if error != 0:
        loop_close_descriptors(loop)
    return error


cdef inline void loop_stop(loop_t* loop) noexcept nogil:
    """End the thread and wait for it; every pipe has been detached, or will be, by now."""
    store_int(&loop.is_stopping, 1)
    loop_wake(loop)
    pthread_join(loop.thread, NULL)
    # From here on is_sleeping is 0 and nobody new writes; who was about to has nearly done so.
    while load_int(&loop.wakers) > 0:
        sched_yield()
    loop_close_descriptors(loop)
