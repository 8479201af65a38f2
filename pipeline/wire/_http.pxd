"""The HTTP/1.1 the cores speak themselves: end a head, recognise one answer and one request.

The recognisers accept a strict subset (design R1): ``HTTP/1.1 204`` and ``POST /raft HTTP/1.1``,
well-formed header lines, framing that cannot be read two ways. What they accept, http.client and
h11 read the same way (tests/fuzz/test_fuzz_answer.py, test_fuzz_request.py); everything else goes
to those two, with the bytes read so far.
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
    # Digits of a Content-Length: no more than a number of bytes can have.
    HTTP_DIGITS_MAX = 15

cdef enum:
    HTTP_MORE = 0       # a proper prefix of an answer; read on
    HTTP_ODD = -1       # not for us
    HTTP_POST = 1       # a head we know how to read


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
    """Tell whether a header leaves the framing as it is: no body, and a connection that is kept or
    closed, which ``http_says_close`` tells.
    """
    while value_n > 0 and (value[0] == 32 or value[0] == 9):
        value += 1
        value_n -= 1
    while value_n > 0 and (value[value_n - 1] == 32 or value[value_n - 1] == 9):
        value_n -= 1
    if http_name_is(name, name_n, b"content-length", 14):
        return value_n == 1 and value[0] == 48
    if http_name_is(name, name_n, b"connection", 10):
        return http_name_is(value, value_n, b"keep-alive", 10) \
            or http_name_is(value, value_n, b"close", 5)
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


cdef inline bint http_says_close(const uint8_t* data, size_t n) noexcept nogil:
    """Tell whether an answer that was recognised is the last on its connection.

    Of several Connection headers http.client sees the first; here one that says so will do.
    """
    cdef size_t i, value
    for i in range(n):
        if data[i] == 10 and i + 11 < n and data[i + 11] == 58 \
                and http_name_is(data + i + 1, 10, b"connection", 10):
            value = i + 12
            while value < n and (data[value] == 32 or data[value] == 9):
                value += 1
            if value < n and data[value] | 0x20 == 99:      # of the two it may be, "close"
                return True
    return False


cdef inline bint http_says_version(const uint8_t* data, size_t n) noexcept nogil:
    """Tell whether an answer that was recognised has X-Server-Version among its headers."""
    cdef size_t i
    for i in range(n):
        if data[i] == 10 and i + 17 < n and data[i + 17] == 58 \
                and http_name_is(data + i + 1, 16, b"x-server-version", 16):
            return True
    return False


# A recognised request head. What a sender's heads differ in from message to message is the length.
cdef struct http_post_t:
    size_t head_len         # bytes, with the blank line
    uint64_t content_length
    size_t digits_at        # where the digits of Content-Length stand
    size_t digits_len


cdef inline bint http_digits(const uint8_t* data, size_t n, uint64_t* value) noexcept nogil:
    """Read ``n`` decimal digits; False for anything else, or too many."""
    cdef size_t i
    if n == 0 or n > HTTP_DIGITS_MAX:
        return False
    value[0] = 0
    for i in range(n):
        if not 48 <= data[i] <= 57:
            return False
        value[0] = value[0] * 10 + (data[i] - 48)
    return True


cdef inline int http_recognise_post(const uint8_t* data, size_t n,
                                    http_post_t* post) noexcept nogil:
    """Recognise the head of a plain POST to /raft: HTTP_POST, HTTP_MORE or HTTP_ODD.

    One Host, one Content-Length, and no header that changes framing, coding or the connection.
    """
    cdef size_t i = 21, name, name_n, value, end
    cdef int headers = 0, hosts = 0, lengths = 0
    if memcmp(data, b"POST /raft HTTP/1.1\r\n", n if n < 21 else 21) != 0:
        return HTTP_ODD
    while True:
        # data[i] starts a line.
        if i >= n:
            return HTTP_MORE
        if data[i] == 13:
            if i + 1 >= n:
                return HTTP_MORE
            if data[i + 1] != 10 or hosts != 1 or lengths != 1:
                return HTTP_ODD
            post.head_len = i + 2
            return HTTP_POST
        headers += 1
        if headers > HTTP_HEADERS_MAX:
            return HTTP_ODD
        name = i
        while i < n and http_token[data[i]]:
            i += 1
        if i >= n:
            return HTTP_MORE
        name_n = i - name
        if data[i] != 58 or name_n == 0:
            return HTTP_ODD
        i += 1
        while i < n and (data[i] == 32 or data[i] == 9):
            i += 1
        value = i
        while i < n and data[i] != 13:
            if (data[i] < 32 and data[i] != 9) or data[i] > 126:
                return HTTP_ODD
            i += 1
        if i + 1 >= n:
            return HTTP_MORE
        if data[i + 1] != 10:
            return HTTP_ODD
        end = i
        i += 2
        while end > value and (data[end - 1] == 32 or data[end - 1] == 9):
            end -= 1
        if http_name_is(data + name, name_n, b"content-length", 14):
            lengths += 1
            post.digits_at = value
            post.digits_len = end - value
            if not http_digits(data + value, end - value, &post.content_length):
                return HTTP_ODD
        elif http_name_is(data + name, name_n, b"host", 4):
            hosts += 1
        elif http_name_is(data + name, name_n, b"connection", 10):
            if not http_name_is(data + value, end - value, b"keep-alive", 10):
                return HTTP_ODD
        elif http_name_is(data + name, name_n, b"transfer-encoding", 17) \
                or http_name_is(data + name, name_n, b"content-encoding", 16) \
                or http_name_is(data + name, name_n, b"expect", 6) \
                or http_name_is(data + name, name_n, b"upgrade", 7):
            return HTTP_ODD


cdef inline bint http_same_post(const uint8_t* data, size_t n, const uint8_t* known,
                                const http_post_t* as_known, http_post_t* post) noexcept nogil:
    """Tell whether ``data`` starts with a ``known`` head but for its length, and read that."""
    cdef size_t i = as_known.digits_at
    cdef size_t after = as_known.digits_at + as_known.digits_len
    cdef size_t rest = as_known.head_len - after
    if n < i + 1 + rest or memcmp(data, known, i) != 0:
        return False
    while i < n and 48 <= data[i] <= 57:
        i += 1
    post.digits_at = as_known.digits_at
    post.digits_len = i - post.digits_at
    post.head_len = i + rest
    return n >= post.head_len and memcmp(data + i, known + after, rest) == 0 \
        and http_digits(data + post.digits_at, post.digits_len, &post.content_length)
