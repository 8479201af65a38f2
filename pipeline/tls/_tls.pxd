"""One TLS connection: OpenSSL over a socket that does not block, for whoever has the connection.

Nothing here needs the GIL, waits, or copies but for the cipher's sake: OpenSSL reads the socket and
writes to it through a BIO of ours (``_engine.pyx``). Reading and writing look like recv(2) and
send(2), and EPROTO is what TLS itself fails with.

A connection is used by one thread at a time. Those threads are the loops', handler threads and the
ones that shake hands, and none of them may be inside OpenSSL when the process exits and OpenSSL
clears itself away. So each is *busy* while it is inside, and whoever ends the process waits for the
busy ones and lets nobody in any more (``engine_t``).
"""

from libc.stdint cimport uint8_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy

from pipeline._system cimport (
    EAGAIN, EINTR, ENOBUFS, ENOMEM, EPIPE, EPROTO, ESHUTDOWN, MSG_DONTWAIT, MSG_NOSIGNAL, errno,
    invariant, load_int, pthread_mutex_t, send, set_errno, store_int,
)
from pipeline.tls._libssl cimport (
    SSL, SSL_ERROR_SYSCALL, SSL_ERROR_WANT_READ, SSL_ERROR_WANT_WRITE, SSL_ERROR_ZERO_RETURN,
    libssl_t,
)

cdef enum:
    # One call takes no more than this: the other connections of a loop have their turn.
    TLS_STEP_BYTES = 1 << 20
    # Of what is read of the socket in one call so much may be no plain text: some thousand updates
    # of the keys, which take ten milliseconds.
    TLS_FUTILE_BYTES = 64 * 1024
    # One call reads the plain text of at most this many records.
    TLS_RECORDS = 128
    # So much the socket may have yet to take: a record, and what TLS itself has to say. A peer that
    # asks for more of that and reads nothing loses its connection.
    TLS_LEFT_BYTES = 64 * 1024

# OpenSSL, and all connections there are. One for the process; never freed.
cdef struct engine_t:
    libssl_t lib
    int is_exiting          # atomic: nobody goes in any more
    pthread_mutex_t lock    # guards the list
    tls_t* first

cdef struct tls_t:
    engine_t* engine
    SSL* ssl                # owned
    tls_t* previous
    tls_t* next
    int is_busy             # atomic: a thread is inside OpenSSL with it
    int fd                  # borrowed from whoever has the connection
    int error               # errno of what failed; EPROTO is TLS
    unsigned long reason    # OpenSSL's, of EPROTO
    bint is_client
    bint is_shaken          # the handshake is over
    bint has_heard          # something has come since, session tickets for one
    bint has_ended          # the peer has said that nothing follows
    bint is_ended           # we have said so
    bint has_failed         # it is of no use any more; the peer has been told why, if TLS failed
    bint wants_to_write     # the socket did not take what was written last
    # Owned: what the socket has yet to take of what OpenSSL wrote; NULL is nothing. OpenSSL itself
    # must have no write under way when it reads: it fails when it has to answer meanwhile.
    uint8_t* left
    size_t left_at          # of it has been taken
    size_t left_size
    size_t owed             # bytes of plain text in it, the writing of which is not told yet
    bint has_moved          # the socket took some of what the last call wrote
    bint has_left           # it took some of what was written since whoever has us cleared this
    bint is_drained         # this call has read the socket until it had no more
    size_t futile           # bytes that this call has read of the socket, beyond its plain text
    bint is_eof             # the socket has ended


cdef inline bint tls_enter(tls_t* tls) noexcept nogil:
    """Go into OpenSSL; False, and ESHUTDOWN, when the process exits."""
    invariant(not load_int(&tls.is_busy))
    store_int(&tls.is_busy, 1)
    if load_int(&tls.engine.is_exiting):
        store_int(&tls.is_busy, 0)
        set_errno(ESHUTDOWN)
        return False
    tls.engine.lib.ERR_clear_error()    # what others have left would be taken for ours
    tls.futile = 0
    return True


cdef inline void tls_leave(tls_t* tls) noexcept nogil:
    store_int(&tls.is_busy, 0)


cdef inline int tls_keep(tls_t* tls, const char* data, size_t size) noexcept nogil:
    """Keep what the socket does not take now, behind what it did not take before; 0 or an errno."""
    cdef uint8_t* left
    if tls.left_size + size > TLS_LEFT_BYTES:
        return ENOBUFS
    left = <uint8_t*>realloc(tls.left, tls.left_size + size)
    if left is NULL:
        return ENOMEM
    memcpy(left + tls.left_size, data, size)
    tls.left = left
    tls.left_size += size
    tls.wants_to_write = True
    return 0


cdef inline bint tls_flush(tls_t* tls) noexcept nogil:
    """Write what the socket did not take before; False, and errno, when it does not take all."""
    cdef ssize_t n
    while tls.left is not NULL:
        n = send(tls.fd, tls.left + tls.left_at, tls.left_size - tls.left_at,
                 MSG_DONTWAIT | MSG_NOSIGNAL)
        if n < 0 and errno == EINTR:
            continue
        if n < 0:
            if errno != EAGAIN:
                tls.has_failed = True
                tls.error = errno
            return False
        tls.has_moved = tls.has_left = True
        tls.left_at += <size_t>n
        if tls.left_at == tls.left_size:
            free(tls.left)
            tls.left = NULL
            tls.left_at = tls.left_size = 0
            tls.wants_to_write = False
    return True


cdef inline int tls_failed(tls_t* tls, int result) noexcept nogil:
    """Make of OpenSSL's failure what recv(2) would return: 0 at the end, or -1 and errno."""
    cdef int kind = tls.engine.lib.SSL_get_error(tls.ssl, result)
    if kind == SSL_ERROR_WANT_READ or kind == SSL_ERROR_WANT_WRITE:
        set_errno(EAGAIN)
        return -1
    if kind == SSL_ERROR_ZERO_RETURN:
        tls.has_ended = True
        return 0
    if kind == SSL_ERROR_SYSCALL and tls.is_eof and tls.error == 0:
        return 0
    if kind != SSL_ERROR_SYSCALL or tls.error == 0:
        tls.error = EPROTO
        tls.reason = tls.engine.lib.ERR_peek_last_error()
    # The application's code may be next in this thread, and take ours for its own.
    tls.engine.lib.ERR_clear_error()
    tls.has_failed = True
    set_errno(tls.error)
    return -1


cdef inline bint tls_is_usable(const tls_t* tls) noexcept nogil:
    """Tell whether it has not failed; otherwise errno says again what it failed with."""
    if tls.has_failed:
        set_errno(tls.error)
    return not tls.has_failed


cdef inline int tls_shake(tls_t* tls) noexcept nogil:
    """Go on with the handshake: 1 when it is over, 0 at the end of the stream, or -1 and errno.

    Takes the CPU for about a millisecond at most.
    """
    cdef int result
    if not tls_is_usable(tls) or not tls_enter(tls):
        return -1
    result = tls.engine.lib.SSL_do_handshake(tls.ssl)
    if result == 1:
        tls.is_shaken = True
    else:
        result = tls_failed(tls, result)
    tls_leave(tls)
    return result


cdef inline ssize_t tls_read(tls_t* tls, void* data, size_t size) noexcept nogil:
    """Read as recv(2) does. Less than was asked for does not mean that no more is there.

    Nor does EAGAIN: a peer that sends much that is no plain text has had its turn
    (``tls_is_unread``). What the peer said before the socket broke can be read after a write has
    failed.
    """
    cdef size_t total = 0
    cdef int result = -1
    cdef int records = 0
    if (tls.error == EPROTO and not tls_is_usable(tls)) or not tls_enter(tls):
        return -1
    if size > TLS_STEP_BYTES:
        size = TLS_STEP_BYTES
    tls_flush(tls)
    # What it was before says nothing: more may have come since, and epoll has spoken of it.
    tls.is_drained = False
    while total < size and records < TLS_RECORDS:
        result = tls.engine.lib.SSL_read(tls.ssl, <uint8_t*>data + total, <int>(size - total))
        if result <= 0:
            result = tls_failed(tls, result)
            break
        total += result
        records += 1
        tls.futile -= min(tls.futile, <size_t>result)
        if tls.is_drained and not tls.engine.lib.SSL_has_pending(tls.ssl):
            break
    tls_leave(tls)
    return <ssize_t>total if total > 0 else result


cdef inline bint tls_is_drained(tls_t* tls) noexcept nogil:
    """Tell whether all that the socket had when it was read last has been read from us.

    So has not an end, or a failure, that was come upon behind what was read: the next read tells
    of it.
    """
    return tls.is_drained and not (tls.has_ended or tls.is_eof or tls.has_failed) \
        and not tls.engine.lib.SSL_has_pending(tls.ssl)


cdef inline bint tls_is_unread(const tls_t* tls) noexcept nogil:
    """Tell, after EAGAIN, whether the socket may have more all the same."""
    return not tls.is_drained


cdef inline bint tls_has_part(tls_t* tls) noexcept nogil:
    """Tell, after EAGAIN, whether a part of a record has come."""
    return tls.engine.lib.SSL_has_pending(tls.ssl)


cdef inline ssize_t tls_write(tls_t* tls, const void* data, size_t size) noexcept nogil:
    """Write as send(2) does. After EAGAIN the same bytes come first the next time, and no fewer."""
    cdef size_t total = 0
    cdef int result = -1
    if not tls_is_usable(tls) or not tls_enter(tls):
        return -1
    if size > TLS_STEP_BYTES:
        size = TLS_STEP_BYTES
    tls.has_moved = False
    if tls_flush(tls):
        total = tls.owed
        tls.owed = 0
        while total < size:
            result = tls.engine.lib.SSL_write(
                tls.ssl, <const uint8_t*>data + total, <int>(size - total))
            if result <= 0:
                if tls_failed(tls, result) == 0:    # the peer had ended before the socket broke
                    tls.has_failed = True
                    if tls.error == 0:
                        tls.error = EPIPE
                    set_errno(tls.error)
                result = -1
                break
            if tls.left is not NULL:
                tls.owed = result
                set_errno(EAGAIN)
                result = -1
                break
            total += result
    tls_leave(tls)
    return <ssize_t>total if total > 0 else result


cdef inline bint tls_is_silent(tls_t* tls) noexcept nogil:
    """Tell whether nothing has come that is not read: no byte, no end, no error.

    Session tickets and the like are none: they are read here.
    """
    cdef uint8_t byte
    cdef int result
    if tls.has_failed or not tls_enter(tls):
        return False
    result = tls.engine.lib.SSL_peek(tls.ssl, &byte, 1)
    if result <= 0:
        result = tls_failed(tls, result)
        result = 0 if result < 0 and errno == EAGAIN else 1
    tls_leave(tls)
    return result == 0


cdef inline bint tls_end(tls_t* tls) noexcept nogil:
    """Tell the peer that nothing follows, before the socket is closed; False if it cannot be told.

    In the middle of a handshake or of a record the connection is to be reset. Were it merely
    closed, an OpenSSL at the other end would answer with an alert, and would be sent SIGPIPE for
    it. Differs from etcd: Go never resets one.
    """
    if tls.has_failed or tls.is_ended:
        return True
    if not tls.is_shaken or tls.left is not NULL:
        return False
    if tls_enter(tls):
        tls.is_ended = True
        tls.engine.lib.SSL_shutdown(tls.ssl)
        tls.engine.lib.ERR_clear_error()
        tls_leave(tls)
    return True


cdef inline void tls_unlink(tls_t* tls) noexcept nogil:
    """Take it off the list. The caller holds the engine's lock."""
    if tls.previous is NULL:
        tls.engine.first = tls.next
    else:
        tls.previous.next = tls.next
    if tls.next is not NULL:
        tls.next.previous = tls.previous
