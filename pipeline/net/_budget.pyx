"""The budget of request bodies, for Python: see ``_budget.pxd``."""

cimport cython
from libc.stdint cimport int64_t

from pipeline._system cimport (
    load_i64, pthread_mutex_destroy, pthread_mutex_init, store_int,
)

__all__ = ["SMALL_BODY_BYTES", "BodyBudget", "BodyShare"]

#: The largest body that counts as a small one.
SMALL_BODY_BYTES = BODY_SMALL


cdef class BodyBudget:
    """Bytes that the bodies of a node's requests may hold together.

    Parameters
    ----------
    size_bytes : int
        For bodies above ``SMALL_BODY_BYTES``.
    small_bytes : int
        For all others.

    Notes
    -----
    Thread-safe. Nothing here waits.
    """

    def __cinit__(self, int64_t size_bytes, int64_t small_bytes):
        self.c.limit = size_bytes
        self.c.small_limit = small_bytes
        pthread_mutex_init(&self.c.lock, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.c.lock)

    @property
    def used(self):
        """Bytes that are counted now, small bodies included."""
        return load_i64(&self.c.used) + load_i64(&self.c.small)

    def share(self):
        """Return a share of nothing yet, for one body: BodyShare."""
        return BodyShare(self)

    def forget_after_fork(self):
        """In a forked child, which has no loop: the lock may have been held."""
        pthread_mutex_init(&self.c.lock, NULL)
        store_int(&self.c.waiting, 0)
        self.c.loops = NULL


@cython.no_gc_clear             # __dealloc__ needs the budget
cdef class BodyShare:
    """What one body counts with, until ``close``, or until nobody has this any more.

    Used by one thread at a time.
    """

    def __cinit__(self, BodyBudget budget not None):
        self.budget = budget

    def __dealloc__(self):
        if self.budget is not None:
            with nogil:
                # A loop may be told that there is room. Only C state is touched.
                share_end(&self.c, &self.budget.c)

    def set(self, int64_t size_bytes):
        """Count with so many bytes, those counted before included.

        Returns whether there is room for them; if not, what was counted before still is.
        """
        cdef bint is_set
        with nogil:
            # As above, or that there is none.
            is_set = share_set(&self.c, &self.budget.c, size_bytes)
        return is_set

    def close(self):
        """Count no more; a second call does nothing."""
        with nogil:
            # As above.
            share_end(&self.c, &self.budget.c)
