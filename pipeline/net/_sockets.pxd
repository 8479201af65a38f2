"""What ``_sockets.pyx`` shares with the other cores."""

from pipeline.net._descriptors cimport descriptors_t

cdef descriptors_t* own_descriptors() noexcept
cdef int fork_count() noexcept
