"""The books of a channel and the statistics of a follower: plain structs under their owner's lock.

Every offer is accepted or refused, and every accepted message has one outcome. Invariant, whenever
the lock is free (design R4; checked in debug builds):
    offered = accepted + refused
    accepted = sent + failed + dropped + queued + in_flight
"""

from libc.math cimport sqrt
from libc.stdint cimport int64_t, uint64_t

from pipeline._system cimport invariant


cdef enum:
    OUTCOME_SENT
    OUTCOME_FAILED
    OUTCOME_DROPPED     # its peer is being stopped


cdef struct books_t:
    uint64_t offered
    uint64_t accepted
    uint64_t refused
    uint64_t sent
    uint64_t failed
    uint64_t dropped
    uint64_t queued
    uint64_t in_flight
    uint64_t sent_bytes     # protobuf bytes, as etcd counts them; no HTTP
    uint64_t queued_bytes


cdef inline void books_check(const books_t* books) noexcept nogil:
    invariant(books.offered == books.accepted + books.refused)
    invariant(books.accepted == books.sent + books.failed + books.dropped
              + books.queued + books.in_flight)


cdef inline void books_offer(books_t* books) noexcept nogil:
    """Count an offer; ``books_refuse`` or ``books_accept`` follows under the same lock."""
    books.offered += 1


cdef inline void books_refuse(books_t* books) noexcept nogil:
    books.refused += 1


cdef inline void books_accept(books_t* books, size_t size_bytes) noexcept nogil:
    """The message is queued."""
    books.accepted += 1
    books.queued += 1
    books.queued_bytes += size_bytes
    books_check(books)


cdef inline void books_take(books_t* books, size_t size_bytes) noexcept nogil:
    """A queued message is in flight."""
    books.queued -= 1
    books.queued_bytes -= size_bytes
    books.in_flight += 1


cdef inline void books_take_run(books_t* books, uint64_t n, size_t size_bytes) noexcept nogil:
    """So many queued messages, of so many bytes together, are in flight."""
    books.queued -= n
    books.queued_bytes -= size_bytes
    books.in_flight += n


cdef inline void books_settle_run(
        books_t* books, uint64_t n, size_t size_bytes, int outcome) noexcept nogil:
    """So many messages in flight have the same outcome: OUTCOME_*."""
    books.in_flight -= n
    if outcome == OUTCOME_SENT:
        books.sent += n
        books.sent_bytes += size_bytes
    elif outcome == OUTCOME_FAILED:
        books.failed += n
    else:
        books.dropped += n
    books_check(books)


cdef inline void books_settle(books_t* books, size_t size_bytes, int outcome) noexcept nogil:
    """A message in flight has its outcome: OUTCOME_*."""
    books_settle_run(books, 1, size_bytes, outcome)


cdef inline void books_drop(books_t* books) noexcept nogil:
    """A message in flight is let go of, for its peer is being stopped."""
    books.in_flight -= 1
    books.dropped += 1
    books_check(books)


# Source: etcd server/etcdserver/api/v2stats/leader.go, FollowerStats. Only MsgApp counts.
cdef struct follower_t:
    uint64_t success
    uint64_t fail
    double current_ms
    double minimum_ms
    double maximum_ms
    double mean_ms
    double m2           # sum of squared distances from the mean (Welford)


cdef inline void follower_success(follower_t* f, int64_t latency_ns) noexcept nogil:
    """Count one MsgApp answered 204 after ``latency_ns``."""
    cdef double ms = <double>latency_ns / 1e6
    cdef double distance = ms - f.mean_ms
    f.success += 1
    f.current_ms = ms
    if f.success == 1 or ms < f.minimum_ms:
        f.minimum_ms = ms
    if ms > f.maximum_ms:
        f.maximum_ms = ms
    # Differs from etcd: Welford's update instead of a running sum of squares, which
    # cancels to noise after hours of sub-millisecond latencies.
    f.mean_ms += distance / <double>f.success
    f.m2 += distance * (ms - f.mean_ms)


cdef inline double follower_stddev_ms(const follower_t* f) noexcept nogil:
    """Population standard deviation, as etcd computes it; 0 before the first success."""
    if f.success == 0:
        return 0.0
    return sqrt(f.m2 / <double>f.success)
