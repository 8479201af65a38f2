"""Taking a C lock in a thread that holds the GIL.

Nobody waits for a lock while holding the GIL, nor for the GIL while holding a lock: the native
threads take the same locks, and would wait with whoever holds one for the GIL. So a thread with the
GIL tries, and lets go of the GIL before it waits.
"""

from pipeline._system cimport (
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_trylock, pthread_mutex_unlock,
)

cdef enum:
    # What is done under a lock takes some 50 ns; who does not get it by then was preempted in it.
    LOCK_TRIES = 100


cdef inline bint try_lock(pthread_mutex_t* mutex) noexcept nogil:
    """Take a lock without waiting for its owner to be scheduled; False if that did not do."""
    cdef int _tries
    for _tries in range(LOCK_TRIES):
        if pthread_mutex_trylock(mutex) == 0:
            return True
    return False


cdef inline void lock_with_gil(pthread_mutex_t* mutex) noexcept:
    """Take a lock for a moment in which the GIL is held as well.

    While the lock's owner is preempted the GIL is let go of. The lock is not kept over the wait for
    the GIL, so another thread may come first, and it is tried again.
    """
    while not try_lock(mutex):
        with nogil:
            # Wait until the owner has let go of it. Only C state is touched.
            pthread_mutex_lock(mutex)
            pthread_mutex_unlock(mutex)
