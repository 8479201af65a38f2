"""The sending loop of a node: one native thread runs the workers of all pipes, without the GIL.

Between two waits of its ``loop_t`` it goes through what others have pushed: workers that Python
gives back, pipes that were offered something, pipes that stop. Who may touch what is told in
``_pipe.pxd``.
"""

from libc.stdint cimport int64_t
from libc.string cimport memset

from pipeline.send._channel cimport channel_take, job_t
from pipeline.net._descriptors cimport descriptors_t
from pipeline.net._loop cimport (
    loop_check_dues, loop_close, loop_init, loop_is_due, loop_may_sleep, loop_open, loop_remove,
    loop_run_events, loop_run_returned, loop_run_runnable, loop_timeout_ms, loop_wait, loop_wake,
    runnable_remove,
)
from pipeline.send._pipe cimport (
    ERROR_STOPPED, EVENT_CLOSED, EVENT_FAILED, SEND_BUFFER_NEAR, WORKER_IDLE, WORKER_PYTHON,
    guest_t, pipe_check_age, pipe_expire, pipe_t, sending_queue_tasks, sending_t, worker_t,
)
from pipeline._system cimport (
    AF_INET, EAGAIN, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET, SO_SNDBUF, close, cond_init_monotonic,
    getsockopt, list_is_empty, list_take, load_i64, load_int, pthread_cond_destroy, pthread_join,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, setsockopt,
    socket, socklen_t, store_int, thread_start,
)
from pipeline.send._worker cimport (
    worker_check_deadline, worker_look_at_state, worker_retire, worker_start, worker_to_python,
)


cdef inline void sending_close_idle(pipe_t* pipe) noexcept nogil:
    """Have idle connections of an earlier generation closed. The caller holds the lock."""
    cdef worker_t** link = &pipe.idle
    cdef worker_t* worker
    while link[0] is not NULL:
        worker = link[0]
        if worker.conn.io.fd >= 0 and worker.generation != load_int(&pipe.generation):
            link[0] = worker.next
            worker_to_python(worker, EVENT_CLOSED, 0)
        else:
            link = &worker.next


cdef inline void sending_run_ready(sending_t* sending, pipe_t* pipe) noexcept nogil:
    """Start idle workers of pipes that were offered something."""
    cdef pipe_t* following
    cdef worker_t* worker
    cdef worker_t** link
    cdef job_t* job
    while pipe is not NULL:
        following = pipe.next_ready
        if not pipe.is_attached:
            pipe.is_attached = True
            pipe.next_attached = sending.attached
            sending.attached = pipe
        pthread_mutex_lock(&pipe.lock)
        pipe.is_scheduled = False
        pipe_expire(pipe, sending.loop.now_ns)
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
            sending_close_idle(pipe)
        pthread_mutex_unlock(&pipe.lock)
        pipe = following


cdef inline void sending_detach(sending_t* sending, pipe_t* pipe) noexcept nogil:
    """Forget a pipe that stops: idle workers retire, busy ones fail with ERROR_STOPPED."""
    cdef pipe_t** link = &sending.attached
    cdef worker_t* worker
    cdef int i, state
    if pipe.is_attached:
        while link[0] is not pipe:
            link = &link[0].next_attached
        link[0] = pipe.next_attached
    pthread_mutex_lock(&pipe.lock)
    pipe.is_detached = True
    pipe.idle = NULL
    for i in range(pipe.n_workers):
        worker = &pipe.workers[i]
        runnable_remove(&sending.loop.runnable, &worker.conn.io)     # Python may have it meanwhile
        state = worker_look_at_state(worker)
        if state == WORKER_PYTHON:
            continue        # it comes back to be retired: worker_give_back
        if state == WORKER_IDLE:
            loop_remove(&sending.loop, &worker.conn.io)
            worker_retire(worker)
        else:
            worker_to_python(worker, EVENT_FAILED, ERROR_STOPPED)
    pthread_mutex_unlock(&pipe.lock)


cdef inline void sending_check_deadlines(sending_t* sending) noexcept nogil:
    """Fail what is overdue and find the next deadline. Runs when one may have passed."""
    cdef pipe_t* pipe = sending.attached
    cdef int i
    sending.loop.next_deadline_ns = 0
    while pipe is not NULL:
        for i in range(pipe.n_workers):
            worker_check_deadline(&pipe.workers[i], sending.loop.now_ns)
        pipe_check_age(pipe, sending.loop.now_ns)
        pipe = pipe.next_attached
    loop_check_dues(&sending.loop)


cdef inline void* sending_main(void* argument) noexcept nogil:
    """The thread. Ends when it is told to, and no pipe is attached any more and no stream runs."""
    cdef sending_t* sending = <sending_t*>argument
    cdef pipe_t* detached
    cdef pipe_t* following
    cdef guest_t* guest = sending.guest
    cdef int timeout_ms
    while True:
        # Detached is taken before ready and returned: what a pipe's owner pushed there before
        # it stopped the pipe is then seen before the pipe is forgotten.
        detached = <pipe_t*>list_take(&sending.detached)
        loop_run_returned(&sending.loop)
        sending_run_ready(sending, <pipe_t*>list_take(&sending.ready))
        while detached is not NULL:
            following = detached.next_detached
            sending_detach(sending, detached)
            detached = following
        loop_run_runnable(&sending.loop)

        timeout_ms = loop_timeout_ms(&sending.loop, sending.release_due_ns)
        if guest is not NULL and guest.is_busy:
            timeout_ms = 0
        if timeout_ms != 0:
            if not loop_may_sleep(&sending.loop) \
                    or not list_is_empty(&sending.ready) \
                    or not list_is_empty(&sending.detached) \
                    or load_int(&sending.is_stopping) \
                    or (guest is not NULL and not guest.may_sleep(guest)):
                timeout_ms = 0
        loop_wait(&sending.loop, timeout_ms)
        loop_run_events(&sending.loop)
        if guest is not NULL:
            guest.turn(guest)
        if loop_is_due(&sending.loop):
            sending_check_deadlines(sending)
        if sending.release_due_ns and sending.loop.now_ns >= sending.release_due_ns:
            sending.release_due_ns = 0
            if load_i64(&sending.finished_jobs) > 0:       # a send may have been quicker
                sending_queue_tasks(sending)
        if load_int(&sending.is_stopping) and sending.attached is NULL \
                and sending.loop.dues is NULL and list_is_empty(&sending.detached) \
                and list_is_empty(&sending.loop.returned):
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


cdef inline int sending_init(sending_t* sending, int64_t queue_bytes) noexcept nogil:
    """Make a loop that is not running yet; 0 or an errno."""
    memset(sending, 0, sizeof(sending_t))
    loop_init(&sending.loop)
    sending.budget.limit = queue_bytes
    sending.has_near_buffer = grants_near_buffer()
    if pthread_mutex_init(&sending.event_lock, NULL) != 0 \
            or cond_init_monotonic(&sending.event_cond) != 0:
        return EAGAIN
    return 0


cdef inline void sending_free(sending_t* sending) noexcept nogil:
    """Free what ``sending_init`` made; the thread has ended."""
    loop_close(&sending.loop)
    pthread_cond_destroy(&sending.event_cond)
    pthread_mutex_destroy(&sending.event_lock)


cdef inline int sending_start(sending_t* sending, descriptors_t* descriptors,
                              int poller_fd) noexcept nogil:
    """Start the thread; 0 or an errno. ``poller_fd`` stays open until ``sending_stop``.

    The descriptors are made here and not before: processes that were forked in between, and start
    their copies of the loop, would share one epoll instance and be given each other's events.
    """
    cdef int error = loop_open(&sending.loop, descriptors)
    sending.poller_fd = poller_fd
    if error == 0:
        error = thread_start(&sending.thread, sending_main, sending, sending.name)
        if error != 0:
            loop_close(&sending.loop)
    return error


cdef inline void sending_stop(sending_t* sending) noexcept nogil:
    """End the thread and wait for it; every pipe has been detached, or will be, by now."""
    store_int(&sending.is_stopping, 1)
    loop_wake(&sending.loop)
    pthread_join(sending.thread, NULL)
    loop_close(&sending.loop)
