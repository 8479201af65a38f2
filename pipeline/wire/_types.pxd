"""The types of messages that the core tells apart, by raftpb's numbers (spec section 1.1).

What depends on them stands in docs/wire.md, and ``tests/functional/test_message_types.py`` holds
sending and receiving to that.
"""

cdef enum:
    TYPE_PROP = 2       # not idempotent; may wait for a leader
    TYPE_APP = 3        # counted for the follower
    TYPE_SNAP = 7       # Raft hears how it ended, however long that takes
