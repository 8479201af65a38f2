"""Who may look at the fields of a message, and who may change them, where there is no GIL.

A message is measured and then written, and an entry's bytes are looked at where they lie. With a
GIL nobody changes anything in between, and all of this is nothing: the compiler leaves it out.
Without one each object has a guard, which many may hold to read, or one to change what it guards.

Who reads a message holds it and everything in it at once, an entry that is in it twice also twice.
Who changes something holds that one guard, for a few stores, and waits for nothing meanwhile. So
nobody ever waits in a circle. A critical section of Python's would not do: it is given up when the
next one has to be waited for.
"""

cdef extern from * nogil:
    """
    #ifdef Py_GIL_DISABLED
    #include <sched.h>
    #define GUARD_IS_NEEDED 1
    typedef struct {
        int held;       /* by so many to read; -1 is by one to change */
    } guard_t;

    static inline int guard_try_read(guard_t *guard) {
        int held = __atomic_load_n(&guard->held, __ATOMIC_RELAXED);
        return held >= 0 && __atomic_compare_exchange_n(
            &guard->held, &held, held + 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
    }
    static inline int guard_try_change(guard_t *guard) {
        int held = 0;
        return __atomic_compare_exchange_n(
            &guard->held, &held, -1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
    }
    /* Waits as whoever waits for a lock: the interpreter may stop this thread meanwhile. */
    static void guard_wait(guard_t *guard, int (*attempt)(guard_t *)) {
        int tries;
        for (tries = 0; tries < 100; tries++)
            if (attempt(guard))
                return;
        Py_BEGIN_ALLOW_THREADS
        while (!attempt(guard))
            sched_yield();
        Py_END_ALLOW_THREADS
    }
    static inline void guard_read(guard_t *guard) {
        if (!guard_try_read(guard))
            guard_wait(guard, guard_try_read);
    }
    static inline void guard_read_end(guard_t *guard) {
        __atomic_fetch_sub(&guard->held, 1, __ATOMIC_RELEASE);
    }
    static inline void guard_change(guard_t *guard) {
        if (!guard_try_change(guard))
            guard_wait(guard, guard_try_change);
    }
    static inline void guard_change_end(guard_t *guard) {
        __atomic_store_n(&guard->held, 0, __ATOMIC_RELEASE);
    }
    #else
    #define GUARD_IS_NEEDED 0
    typedef struct { } guard_t;
    #define guard_read(guard) ((void)(guard))
    #define guard_read_end(guard) ((void)(guard))
    #define guard_change(guard) ((void)(guard))
    #define guard_change_end(guard) ((void)(guard))
    #endif
    """
    ctypedef struct guard_t:
        pass

    # Whether there is no GIL, known to the compiler.
    const bint GUARD_IS_NEEDED
    # Hold it to read. No Python code is to run until the end of it.
    void guard_read(guard_t*)
    void guard_read_end(guard_t*)
    # Hold it to change what it guards. What that drops is dropped after the end of it.
    void guard_change(guard_t*)
    void guard_change_end(guard_t*)
