"""A connection of a loop: a socket, plain or with TLS. Who reads and writes need not know which.

One branch, on ``conn.tls``, in each function here. Who reads and writes requests does not ask
whether bytes are encrypted; only handshakes and the ends of a caller's connection are TLS's own
(``_requests.pxd``).
Reading and writing are as recv(2) and send(2) of a socket that does not block: EAGAIN when it is
not ready, and EPROTO is what TLS fails with (``_tls.pxd``).
"""

from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memcpy, memset
from posix.uio cimport iovec

from pipeline.net._cursor cimport cursor_advance, cursor_gather, cursor_t
from pipeline.net._link cimport link_is_dead, link_is_silent
from pipeline.net._loop cimport io_t
from pipeline._system cimport (
    MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_WR, msghdr, recv, send, sendmsg, shutdown,
)
from pipeline.tls._tls cimport (
    tls_end, tls_has_part, tls_is_drained, tls_is_silent, tls_is_unread, tls_read, tls_t, tls_write,
)

cdef enum:
    # Pieces that one call writes at most.
    CONN_PIECES = 64
    # The plain text of a record (RFC 8446 section 5.1).
    RECORD_BYTES = 16 * 1024


# It comes first in its struct, and io comes first in it: a pointer to one is a pointer to all.
cdef struct conn_t:
    io_t io
    tls_t* tls              # NULL is plain; a caller owns it, a worker borrows it


cdef inline ssize_t conn_recv(conn_t* conn, void* data, size_t size) noexcept nogil:
    """Read some bytes; 0 at the end of the stream, -1 and errno."""
    if conn.tls is not NULL:
        return tls_read(conn.tls, data, size)
    return recv(conn.io.fd, data, size, MSG_DONTWAIT)


cdef inline bint conn_has_more(conn_t* conn, size_t size, size_t asked) noexcept nogil:
    """Tell whether there may be more to read, of which epoll will not speak again.

    ``size`` bytes have just been read of the ``asked``. TLS may have read ahead.
    """
    return size == asked or (conn.tls is not NULL and not tls_is_drained(conn.tls))


cdef inline bint conn_is_unread(const conn_t* conn) noexcept nogil:
    """Tell, after EAGAIN, whether there may be more to read all the same.

    Of TLS what is no plain text may have taken its turn.
    """
    return conn.tls is not NULL and tls_is_unread(conn.tls)


cdef inline bint conn_has_part(conn_t* conn) noexcept nogil:
    """Tell, after EAGAIN, whether a part of something has come that cannot be read yet."""
    return conn.tls is not NULL and tls_has_part(conn.tls)


cdef inline ssize_t conn_send(conn_t* conn, const void* data, size_t size) noexcept nogil:
    """Write some bytes; how many, -1 and errno. What was not taken comes first the next time."""
    if conn.tls is not NULL:
        return tls_write(conn.tls, data, size)
    return send(conn.io.fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL)


cdef inline ssize_t conn_send_next(conn_t* conn, cursor_t* cursor, size_t size_max) noexcept nogil:
    """Write some of what a cursor is at, ``size_max`` bytes at most, and go on by as much.

    How many bytes, -1 and errno. With TLS pieces that are smaller than a record are put together
    first, and it may be up to a record more; larger ones are encrypted from where they lie.
    """
    cdef iovec pieces[CONN_PIECES]
    cdef uint8_t record[RECORD_BYTES]
    cdef msghdr message
    cdef size_t size = 0
    cdef ssize_t n
    cdef int i, count
    if conn.tls is NULL:
        memset(&message, 0, sizeof(message))
        message.msg_iov = pieces
        message.msg_iovlen = cursor_gather(cursor, pieces, CONN_PIECES, size_max)
        n = sendmsg(conn.io.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
    else:
        count = cursor_gather(cursor, pieces, CONN_PIECES, size_max)
        if count == 1 or pieces[0].iov_len >= RECORD_BYTES:
            n = tls_write(conn.tls, pieces[0].iov_base, pieces[0].iov_len)
        else:
            # Not size_max of them: after EAGAIN the same bytes have to come, and no fewer.
            count = cursor_gather(cursor, pieces, CONN_PIECES, RECORD_BYTES)
            for i in range(count):
                memcpy(record + size, pieces[i].iov_base, pieces[i].iov_len)
                size += pieces[i].iov_len
            n = tls_write(conn.tls, record, size)
    if n > 0:
        cursor_advance(cursor, <size_t>n)
    return n


cdef inline void conn_begin_message(conn_t* conn) noexcept nogil:
    """Of what is written from now on nothing has left yet."""
    if conn.tls is not NULL:
        conn.tls.has_left = False


cdef inline bint conn_has_left(const conn_t* conn) noexcept nogil:
    """Tell whether something of the message may have left, although no byte is told as written."""
    return conn.tls is not NULL and conn.tls.has_left


cdef inline bint conn_has_moved(const conn_t* conn) noexcept nogil:
    """Tell whether of what was written last, and not taken, a part has gone all the same."""
    return conn.tls is not NULL and conn.tls.has_moved


cdef inline bint conn_reads_ahead(const conn_t* conn) noexcept nogil:
    """Tell whether there may be more to read although epoll is silent: TLS has a buffer."""
    return conn.tls is not NULL


cdef inline bint conn_has_ended(const conn_t* conn) noexcept nogil:
    """Tell whether TLS has read the end, or an error, of which epoll will not speak again."""
    return conn.tls is not NULL and (conn.tls.has_ended or conn.tls.has_failed)


cdef inline bint conn_wants_to_write(const conn_t* conn) noexcept nogil:
    """Tell whether reading goes on only when the socket takes what TLS itself has to say."""
    return conn.tls is not NULL and conn.tls.wants_to_write


cdef inline bint conn_is_silent(conn_t* conn) noexcept nogil:
    """Tell whether nothing has come that is not read yet: no byte, no end, no error."""
    if conn.tls is not NULL:
        return tls_is_silent(conn.tls)
    return link_is_silent(conn.io.fd)


cdef inline bint conn_is_dead(conn_t* conn, int64_t timeout_ns) noexcept nogil:
    """Tell whether the peer has not acknowledged anything for too long although it should have."""
    return link_is_dead(conn.io.fd, timeout_ns)


cdef inline bint conn_end(conn_t* conn) noexcept nogil:
    """Tell the peer that nothing follows; False when it cannot be told."""
    cdef bint is_told = conn.tls is NULL or tls_end(conn.tls)
    return shutdown(conn.io.fd, SHUT_WR) == 0 and is_told
