"""Heads that Python has accepted: one that differs in its length only needs no second look.

Whoever has a ``heads_t`` guards it with a lock; the caller of each function holds it.
"""

from libc.stdint cimport uint64_t, uint8_t
from libc.stdlib cimport free

from pipeline.wire._http cimport http_post_t, http_same_post

cdef enum:
    HEADS_MAX = 64

cdef struct head_t:
    uint8_t* data           # owned
    http_post_t post
    uint64_t sender         # X-Server-From; 0 for none

cdef struct heads_t:
    head_t kept[HEADS_MAX]
    int n
    int next                # makes room for the next one


cdef inline const head_t* heads_find(const heads_t* heads, const uint8_t* data, size_t n,
                                     http_post_t* post) noexcept nogil:
    """Find the accepted head that ``data`` begins with, and read its length; NULL if it is new."""
    cdef int i
    for i in range(heads.n):
        if http_same_post(data, n, heads.kept[i].data, &heads.kept[i].post, post):
            return &heads.kept[i]
    return NULL


cdef inline void heads_add(heads_t* heads, uint8_t* data, const http_post_t* post,
                           uint64_t sender) noexcept nogil:
    """Accept a head, whose bytes become ours; the oldest one makes room."""
    cdef head_t* head = &heads.kept[heads.next]
    free(head.data)
    head.data = data
    head.post = post[0]
    head.sender = sender
    heads.next = (heads.next + 1) % HEADS_MAX
    if heads.n < HEADS_MAX:
        heads.n += 1


cdef inline void heads_free(heads_t* heads) noexcept nogil:
    cdef int i
    for i in range(heads.n):
        free(heads.kept[i].data)
