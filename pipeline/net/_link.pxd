"""A TCP connection as the kernel sees it: whether the peer acknowledges, whether anything has come.

For the sending loop, and through ``_sockets.pyx`` for the threads that send snapshots.
"""

from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memset

from pipeline._system cimport (
    EAGAIN, IPPROTO_TCP, MSG_DONTWAIT, MSG_PEEK, TCP_INFO, errno, getsockopt, recv, socklen_t,
    tcp_info,
)

cdef enum:
    # What is sent on a live link is acknowledged within this: a round trip, a delayed ACK.
    LINK_ANSWER_MS = 500


cdef inline bint link_is_dead(int fd, int64_t timeout_ns) noexcept nogil:
    """Tell whether the peer has not acknowledged anything for too long although it should have.

    Not TCP_USER_TIMEOUT, which also ends a connection whose live peer does not read for a while:
    that is for the stall timeout. A peer that owes no acknowledgement is probed by keepalive.
    """
    cdef tcp_info info
    cdef socklen_t size = sizeof(info)
    memset(&info, 0, sizeof(info))
    if getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) != 0:    # a system that does not tell
        return False
    if <int64_t>info.tcpi_last_ack_recv * 1000000 < timeout_ns:
        return False
    # A live peer with a closed window answers each retransmission, and each probe, however far
    # apart back-off puts them.
    return info.tcpi_probes >= 2 or (
        info.tcpi_unacked > 0
        and info.tcpi_last_ack_recv > info.tcpi_last_data_sent + LINK_ANSWER_MS)


cdef inline bint link_is_silent(int fd) noexcept nogil:
    """Tell whether nothing has come that is not read yet: no byte, no end, no error."""
    cdef uint8_t byte
    return recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 and errno == EAGAIN
