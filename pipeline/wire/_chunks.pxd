"""Chunked framing (RFC 9112 section 7.1) in its plain form: sizes, data, and an end.

A strict subset, as the recognisers of ``_http`` (design R1): what is accepted here, h11 reads the
same way (tests/fuzz/test_fuzz_request.py); extensions, trailers and whatever is no size at all are
left to it, with the bytes of their line. Small chunks are the reason: to h11 each is an event of
some 20 us with the GIL held, here it takes some 20 ns without.
"""

from libc.stdint cimport uint64_t, uint8_t
from libc.string cimport memmove

cdef enum:
    CHUNKS_MORE = 0     # all of the bytes are used up
    CHUNKS_END = 1      # the body is whole; what comes behind it is the next request's
    CHUNKS_ODD = -1     # a line that is not for us; what was read of it is in ``line``
    CHUNKS_BAD = -2     # no line's end behind the data of a chunk

cdef enum:
    CHUNK_SIZE = 0      # reads the digits of a size
    CHUNK_SIZE_LF       # the LF behind them
    CHUNK_DATA
    CHUNK_CR            # the CR behind the data
    CHUNK_LF
    CHUNK_LAST_CR       # the empty line behind the size 0
    CHUNK_LAST_LF

cdef enum:
    CHUNK_DIGITS_MAX = 8    # no more than a body that anybody takes can have

cdef struct chunks_t:
    int state
    int digits
    uint64_t left           # the size that is being read; then what is to come of the data
    int line_len
    uint8_t line[CHUNK_DIGITS_MAX + 4]  # digits, CR LF, CR


cdef inline int chunk_digit(uint8_t char_) noexcept nogil:
    """The value of a hexadecimal digit; -1 for anything else."""
    if 48 <= char_ <= 57:
        return char_ - 48
    char_ |= 32
    return char_ - 87 if 97 <= char_ <= 102 else -1


cdef inline int chunk_line(chunks_t* chunks, uint8_t char_) noexcept nogil:
    """Read one byte of a line; CHUNKS_MORE, or what it makes of the line."""
    cdef int digit
    if chunks.state == CHUNK_SIZE:
        digit = chunk_digit(char_)
        if digit >= 0 and chunks.digits < CHUNK_DIGITS_MAX:
            chunks.digits += 1
            chunks.left = chunks.left * 16 + digit
        elif char_ == 13 and chunks.digits > 0:
            chunks.state = CHUNK_SIZE_LF
        else:
            return CHUNKS_ODD
    elif chunks.state == CHUNK_SIZE_LF:
        if char_ != 10:
            return CHUNKS_ODD
        if chunks.left > 0:
            chunks.state = CHUNK_DATA
            chunks.line_len = 0
            return CHUNKS_MORE
        chunks.state = CHUNK_LAST_CR
    elif chunks.state == CHUNK_LAST_CR:
        if char_ != 13:
            return CHUNKS_ODD
        chunks.state = CHUNK_LAST_LF
    else:
        return CHUNKS_END if char_ == 10 else CHUNKS_ODD
    chunks.line[chunks.line_len] = char_
    chunks.line_len += 1
    return CHUNKS_MORE


cdef inline int chunks_read(chunks_t* chunks, const uint8_t* data, size_t n, uint8_t* out,
                            size_t* used, size_t* made) noexcept nogil:
    """Take the framing off ``n`` bytes; ``out`` has room for as many, and may be ``data``.

    Of the bytes ``used`` have been looked at, and ``made`` are the body's.
    """
    cdef size_t i = 0, m = 0, take
    cdef int verdict = CHUNKS_MORE
    while i < n and verdict == CHUNKS_MORE:
        if chunks.state == CHUNK_DATA:
            take = n - i
            if take > chunks.left:
                take = <size_t>chunks.left
            memmove(out + m, data + i, take)
            i += take
            m += take
            chunks.left -= take
            if chunks.left == 0:
                chunks.state = CHUNK_CR
        elif chunks.state == CHUNK_CR or chunks.state == CHUNK_LF:
            if data[i] != (13 if chunks.state == CHUNK_CR else 10):
                verdict = CHUNKS_BAD
            elif chunks.state == CHUNK_CR:
                chunks.state = CHUNK_LF
            else:
                chunks.state = CHUNK_SIZE
                chunks.digits = 0
            i += 1
        else:
            verdict = chunk_line(chunks, data[i])
            if verdict != CHUNKS_ODD:
                i += 1
    used[0] = i
    made[0] = m
    return verdict
