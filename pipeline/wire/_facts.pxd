"""What the frame of a message is chosen by, as whoever has encoded or read the message tells.

Apart from the frames (``_frames.pxd``), whose module knows messages, which tell this.
"""

from libc.stdint cimport uint64_t

cdef struct facts_t:
    bint is_bare            # it says nothing that a MsgApp of kind 01 would not
    uint64_t from_
    uint64_t to
    uint64_t term
    uint64_t log_term
    uint64_t index
    uint64_t last_index     # of its last entry, or its own without entries
    uint64_t commit
    size_t entries_at       # before which there are none
    size_t count
    size_t entries_bytes
