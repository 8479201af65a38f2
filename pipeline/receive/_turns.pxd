"""Whose request is next: turns between hosts, and between the members of a host.

In a lane hosts take turns, then the members of the host whose turn it is, then that member's
connections. So whatever one peer sends, and over however many connections, another's request waits
for one of its requests at most. A host is the remote address of a connection; of IPv6 the first
half, which is what a site is given. A member is what the sender says it is (X-Server-From): who
claims to be many takes turns from its own host only.

The caller holds the lock of the server that the turns are of.
"""

from libc.stdint cimport uint16_t, uint64_t, uint8_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from pipeline._system cimport AF_INET, sockaddr_storage

cdef enum:
    LANE_CONTROL = 0        # heartbeats, votes, answers: what keeps a cluster together
    LANE_APPENDS
    LANE_PROPOSALS          # wait for a leader
    LANE_LARGE              # take long: to decode, to make objects of
    LANES
    HOST_BUCKETS = 256
    # Members that a host has turns for; who comes later shares theirs.
    HOST_MEMBERS = 64


# Something that waits for its turn, and has others wait for theirs in it.
cdef struct turn_t:
    turn_t* next
    turn_t* head            # whose turn is next; NULL when nobody waits
    turn_t* tail


cdef struct member_t:
    turn_t turns[LANES]
    host_t* host
    member_t* next          # of its host
    uint64_t id
    int connections


cdef struct host_t:
    turn_t turns[LANES]
    host_t* next            # in its bucket
    member_t* members       # owned: there as long as they have connections
    int n_members
    uint64_t address[2]


cdef struct turns_t:
    turn_t lanes[LANES]
    host_t* hosts[HOST_BUCKETS]     # owned: there as long as they have members


cdef inline void turn_append(turn_t* of, turn_t* turn) noexcept nogil:
    turn.next = NULL
    if of.head is NULL:
        of.head = turn
    else:
        of.tail.next = turn
    of.tail = turn


cdef inline turn_t* turn_pop(turn_t* of) noexcept nogil:
    cdef turn_t* turn = of.head
    of.head = turn.next
    return turn


cdef inline void turns_push(turns_t* turns, int lane, member_t* member,
                            turn_t* request) noexcept nogil:
    """Let a request of a member wait for its turn in a lane."""
    cdef turn_t* of_member = &member.turns[lane]
    cdef turn_t* of_host = &member.host.turns[lane]
    if of_member.head is NULL:
        if of_host.head is NULL:
            turn_append(&turns.lanes[lane], of_host)
        turn_append(of_host, of_member)
    turn_append(of_member, request)


cdef inline turn_t* turns_take(turns_t* turns, int lane) noexcept nogil:
    """Take the request whose turn it is, or NULL."""
    cdef turn_t* of_lane = &turns.lanes[lane]
    cdef turn_t* of_host
    cdef turn_t* of_member
    cdef turn_t* request
    if of_lane.head is NULL:
        return NULL
    of_host = turn_pop(of_lane)
    of_member = turn_pop(of_host)
    request = turn_pop(of_member)
    if of_member.head is not NULL:
        turn_append(of_host, of_member)
    if of_host.head is not NULL:
        turn_append(of_lane, of_host)
    return request


cdef inline turn_t* turns_next(const turns_t* turns, int lane) noexcept nogil:
    """Return the request whose turn it is and leave it there. One waits."""
    return turns.lanes[lane].head.head.head


cdef inline bint turns_wait(const turns_t* turns, int lane) noexcept nogil:
    """Tell whether a request waits in a lane."""
    return turns.lanes[lane].head is not NULL


cdef inline void host_address(const sockaddr_storage* remote, uint64_t* address) noexcept nogil:
    """Write what tells hosts apart. sockaddr_in has its address at 4, sockaddr_in6 at 8."""
    cdef const uint8_t* raw = <const uint8_t*>remote
    cdef uint8_t mapped[12]
    cdef uint16_t family
    memset(mapped, 0, 10)
    memset(mapped + 10, 0xFF, 2)
    address[0] = address[1] = 0
    memcpy(&family, raw, sizeof(family))
    if family == AF_INET:
        memcpy(&address[1], raw + 4, 4)
    elif memcmp(raw + 8, mapped, 12) == 0:      # IPv4, to a socket that takes both
        memcpy(&address[1], raw + 20, 4)
    else:
        memcpy(&address[0], raw + 8, 8)


cdef inline int host_bucket(const uint64_t* address) noexcept nogil:
    cdef uint64_t mixed = (address[0] ^ address[1]) * <uint64_t>0x9E3779B97F4A7C15
    return <int>(mixed >> 56)


cdef inline member_t* host_join(host_t* host, uint64_t id) noexcept nogil:
    """Count a connection of a member; NULL without memory."""
    cdef member_t* member = host.members
    while member is not NULL and member.id != id:
        member = member.next
    if member is NULL and host.n_members >= HOST_MEMBERS:
        member = host.members
    if member is NULL:
        member = <member_t*>calloc(1, sizeof(member_t))
        if member is NULL:
            return NULL
        member.host = host
        member.id = id
        member.next = host.members
        host.members = member
        host.n_members += 1
    member.connections += 1
    return member


cdef inline member_t* turns_join(turns_t* turns, const sockaddr_storage* remote) noexcept nogil:
    """Count a new connection, of a member that is not known yet; NULL without memory."""
    cdef uint64_t address[2]
    cdef host_t** bucket
    cdef host_t* host
    cdef member_t* member
    host_address(remote, address)
    bucket = &turns.hosts[host_bucket(address)]
    host = bucket[0]
    while host is not NULL and memcmp(host.address, address, sizeof(address)) != 0:
        host = host.next
    if host is NULL:
        host = <host_t*>calloc(1, sizeof(host_t))
        if host is NULL:
            return NULL
        memcpy(host.address, address, sizeof(address))
        host.next = bucket[0]
        bucket[0] = host
    member = host_join(host, 0)
    if member is NULL and host.members is NULL:
        bucket[0] = host.next
        free(host)
    return member


cdef inline void turns_leave(turns_t* turns, member_t* member) noexcept nogil:
    """Count a connection no more; none of its requests waits."""
    cdef host_t* host = member.host
    cdef member_t** of_host = &host.members
    cdef host_t** bucket
    member.connections -= 1
    if member.connections > 0:
        return
    while of_host[0] is not member:
        of_host = &of_host[0].next
    of_host[0] = member.next
    free(member)
    host.n_members -= 1
    if host.n_members > 0:
        return
    bucket = &turns.hosts[host_bucket(host.address)]
    while bucket[0] is not host:
        bucket = &bucket[0].next
    bucket[0] = host.next
    free(host)
