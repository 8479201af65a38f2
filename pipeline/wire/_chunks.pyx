# cython: auto_pickle=False
"""The class over ``_chunks.pxd``, for those who have the bytes of a chunked body in Python."""

from cpython.bytearray cimport (
    PyByteArray_AS_STRING, PyByteArray_FromStringAndSize, PyByteArray_Resize,
)
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t
from libc.string cimport memset

__all__ = ["Chunks"]

cdef enum:
    # From here on it takes longer than to let go of the GIL and to take it again.
    NOGIL_MIN = 4096


cdef class Chunks:
    """The framing of one body.

    Attributes
    ----------
    is_whole : bool
        The end has come.
    is_odd : bool
        A line has come that is left to h11: ``line`` is what was read of it, and ``used`` bytes of
        what was decoded last were looked at. Nothing is to be decoded any more.
    used : int

    Notes
    -----
    Used by one thread at a time.
    """

    cdef chunks_t c
    cdef readonly bint is_whole
    cdef readonly bint is_odd
    cdef readonly size_t used

    def __cinit__(self):
        memset(&self.c, 0, sizeof(chunks_t))

    @property
    def line(self):
        """What has been read of a line that is not whole."""
        return PyBytes_FromStringAndSize(<char*>self.c.line, self.c.line_len)

    def decode(self, const uint8_t[::1] data not None):
        """Take the framing off ``data``: what it has of the body, a bytearray.

        Large pieces without the GIL. Raises ``ValueError`` for a chunk that does not end where it
        should.
        """
        cdef size_t n = data.shape[0], made = 0
        cdef int verdict = CHUNKS_MORE
        cdef const uint8_t* source
        cdef uint8_t* out
        body = PyByteArray_FromStringAndSize(NULL, n)
        self.used = 0
        if n == 0 or self.is_whole or self.is_odd:
            PyByteArray_Resize(body, 0)
            return body
        source = &data[0]
        out = <uint8_t*>PyByteArray_AS_STRING(body)
        if n < NOGIL_MIN:
            verdict = chunks_read(&self.c, source, n, out, &self.used, &made)
        else:
            with nogil:
                # Read what has come. The bytes and the room for them are this call's.
                verdict = chunks_read(&self.c, source, n, out, &self.used, &made)
        if verdict == CHUNKS_BAD:
            raise ValueError("malformed chunk footer")
        self.is_whole = verdict == CHUNKS_END
        self.is_odd = verdict == CHUNKS_ODD
        PyByteArray_Resize(body, made)
        return body
