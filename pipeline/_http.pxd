"""The HTTP/1.1 the sending core speaks itself: end a request head, recognise one answer.

The recogniser accepts a strict subset (design R1): ``HTTP/1.1 204``, well-formed header lines,
framing that cannot be read two ways. What it accepts, http.client reads the same way
(tests/fuzz/test_fuzz_answer.py); everything else goes to http.client with the bytes read so far.
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcmp, memcpy


cdef enum:
    # Longest answer head recognised here; etcd's is about 110 bytes.
    HTTP_ANSWER_MAX = 2048
    # "18446744073709551615\r\n\r\n"
    HTTP_LENGTH_MAX = 24
    # http.client refuses more than 100.
    HTTP_HEADERS_MAX = 64

cdef enum:
    HTTP_MORE = 0       # a proper prefix of an answer; read on
    HTTP_ODD = -1       # not for us


cdef extern from * nogil:
    """
    /* RFC 9110 5.6.2, token characters. */
    static const unsigned char http_token[256] = {
        ['!'] = 1, ['#'] = 1, ['$'] = 1, ['%'] = 1, ['&'] = 1, ['\\''] = 1, ['*'] = 1, ['+'] = 1,
        ['-'] = 1, ['.'] = 1, ['^'] = 1, ['_'] = 1, ['`'] = 1, ['|'] = 1, ['~'] = 1,
        ['0' ... '9'] = 1, ['A' ... 'Z'] = 1, ['a' ... 'z'] = 1,
    };
    """
    const unsigned char http_token[256]


cdef inline size_t http_end_head(uint8_t* out, uint64_t content_length) noexcept nogil:
    """Write the digits and the blank line that end a head; at most HTTP_LENGTH_MAX bytes."""
    cdef uint8_t digits[20]
    cdef size_t n = 0, i
    while True:
        digits[n] = <uint8_t>(48 + content_length % 10)
        n += 1
        content_length //= 10
        if content_length == 0:
            break
    for i in range(n):
        out[i] = digits[n - 1 - i]
    memcpy(out + n, b"\r\n\r\n", 4)
    return n + 4


cdef inline bint http_name_is(const uint8_t* name, size_t n, const char* lower,
                              size_t lower_n) noexcept nogil:
    """Compare a header name with a lower-case one, ignoring case."""
    cdef size_t i
    if n != lower_n:
        return False
    for i in range(n):
        if (name[i] | 0x20) != <uint8_t>lower[i]:
            return False
    return True


cdef inline bint http_field_is_plain(const uint8_t* name, size_t name_n, const uint8_t* value,
                                     size_t value_n) noexcept nogil:
    """Tell whether a header leaves the framing as it is: no body, connection kept."""
    while value_n > 0 and (value[0] == 32 or value[0] == 9):
        value += 1
        value_n -= 1
    while value_n > 0 and (value[value_n - 1] == 32 or value[value_n - 1] == 9):
        value_n -= 1
    if http_name_is(name, name_n, b"content-length", 14):
        return value_n == 1 and value[0] == 48
    if http_name_is(name, name_n, b"connection", 10):
        return http_name_is(value, value_n, b"keep-alive", 10)
    return not http_name_is(name, name_n, b"transfer-encoding", 17)


cdef inline int http_recognise_204(const uint8_t* data, size_t n) noexcept nogil:
    """Recognise a success at the start of ``data``.

    Returns its length in bytes, HTTP_MORE or HTTP_ODD.
    """
    cdef size_t i = 13, name, colon
    cdef int headers = 0
    if memcmp(data, b"HTTP/1.1 204 ", n if n < 13 else 13) != 0:
        return HTTP_ODD
    if n < 13:
        return HTTP_MORE
    while i < n and data[i] != 13:              # reason phrase
        if data[i] < 32 or data[i] > 126:
            return HTTP_ODD
        i += 1
    while True:
        # data[i] is the CR that ends a line, or the data ends within the line.
        if i + 1 >= n:
            return HTTP_MORE
        if data[i + 1] != 10:
            return HTTP_ODD
        i += 2
        if i >= n:
            return HTTP_MORE
        if data[i] == 13:                       # the blank line
            if i + 1 >= n:
                return HTTP_MORE
            return <int>(i + 2) if data[i + 1] == 10 else HTTP_ODD
        headers += 1
        if headers > HTTP_HEADERS_MAX:
            return HTTP_ODD
        name = i
        while i < n and http_token[data[i]]:
            i += 1
        if i >= n:
            return HTTP_MORE
        colon = i
        if data[i] != 58 or colon == name:
            return HTTP_ODD
        i += 1
        while i < n and data[i] != 13:
            if (data[i] < 32 and data[i] != 9) or data[i] > 126:
                return HTTP_ODD
            i += 1
        if i >= n:
            return HTTP_MORE
        if not http_field_is_plain(data + name, colon - name, data + colon + 1, i - colon - 1):
            return HTTP_ODD
