from pipeline.tls._libssl cimport SSL_CTX
from pipeline.tls._tls cimport tls_t

cdef tls_t* tls_make(SSL_CTX* context, int fd, bint is_client) noexcept nogil
cdef void tls_free(tls_t* tls) noexcept nogil
cdef object certificate_of(tls_t* tls)
cdef str reason_of(tls_t* tls)


cdef class Context:
    cdef SSL_CTX* c
    cdef readonly double not_after
    cdef readonly bint is_server

    cdef tls_t* open(self, int fd, str name) except NULL


cdef class Session:
    cdef tls_t* c       # owned
    cdef str name

    @staticmethod
    cdef Session adopt(tls_t* tls)

    cdef object failure(self)
    cdef str describe_failure(self)
