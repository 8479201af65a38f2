"""Where we are in a row of pieces of memory: a request on its way out, whose head comes first.

There is one way through them, for whoever writes. The loop gathers what comes next for ``sendmsg``,
TLS takes a piece at a time, and both go on by as many bytes as were taken.
"""

from libc.stdint cimport uint8_t
from posix.uio cimport iovec


cdef struct cursor_t:
    const iovec* pieces     # borrowed: the job's
    int n
    int at                  # the next piece; n when all have been passed
    size_t offset           # within it


cdef inline void cursor_begin(cursor_t* cursor, const iovec* pieces, int n) noexcept nogil:
    cursor.pieces = pieces
    cursor.n = n
    cursor.at = 0
    cursor.offset = 0


cdef inline bint cursor_is_at_end(const cursor_t* cursor) noexcept nogil:
    return cursor.at >= cursor.n


cdef inline int cursor_gather(const cursor_t* cursor, iovec* out, int n_max,
                              size_t size_max) noexcept nogil:
    """List what comes next, up to ``n_max`` pieces and ``size_max`` bytes; the number of pieces.

    An empty piece is listed as one.
    """
    cdef size_t offset = cursor.offset
    cdef size_t size
    cdef int i = cursor.at, n = 0
    while i < cursor.n and n < n_max and size_max > 0:
        size = cursor.pieces[i].iov_len - offset
        if size > size_max:
            size = size_max
        out[n].iov_base = <uint8_t*>cursor.pieces[i].iov_base + offset
        out[n].iov_len = size
        size_max -= size
        n += 1
        i += 1
        offset = 0
    return n


cdef inline void cursor_advance(cursor_t* cursor, size_t size) noexcept nogil:
    """Go on by so many bytes, and over the empty pieces behind them."""
    cdef size_t left
    while cursor.at < cursor.n:
        left = cursor.pieces[cursor.at].iov_len - cursor.offset
        if size < left:
            cursor.offset += size
            return
        size -= left
        cursor.at += 1
        cursor.offset = 0
