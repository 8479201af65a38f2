"""The TLS engine for Python: OpenSSL's contexts, and sessions made of them (``_tls.pxd``)."""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdlib cimport atexit, calloc, free

from pipeline.tls._libssl cimport (
    ASN1_STRING, ASN1_TIME, BIO, BIO_CTRL_FLUSH, BIO_FLAGS_IO_SPECIAL, BIO_FLAGS_READ,
    BIO_FLAGS_SHOULD_RETRY, BIO_FLAGS_WRITE, BIO_METHOD, BIO_TYPE_SOURCE_SINK, ERR_LIB_PEM,
    GENERAL_NAME, GEN_DIRNAME, GEN_DNS, GEN_EMAIL, GEN_IPADD, GEN_RID, GEN_URI,
    NID_subject_alt_name, OPENSSL_STACK, PEM_R_NO_START_LINE, SSL_CTRL_MODE,
    SSL_CTRL_SET_MIN_PROTO_VERSION, SSL_CTRL_SET_READ_AHEAD, SSL_CTRL_SET_SESS_CACHE_MODE,
    SSL_CTRL_SET_TLSEXT_HOSTNAME, SSL_CTX, SSL_FILETYPE_PEM, SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER,
    SSL_MODE_ENABLE_PARTIAL_WRITE, SSL_MODE_RELEASE_BUFFERS, SSL_OP_NO_COMPRESSION,
    SSL_OP_NO_RENEGOTIATION, SSL_OP_NO_TICKET, SSL_SESS_CACHE_OFF, SSL_VERIFY_FAIL_IF_NO_PEER_CERT,
    SSL_VERIFY_NONE, SSL_VERIFY_PEER, TLS1_2_VERSION, TLS1_3_VERSION, TLSEXT_NAMETYPE_host_name,
    V_ASN1_NEG, X509, X509_CHECK_FLAG_NEVER_CHECK_SUBJECT, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS,
    X509_CRL, X509_NAME, X509_NAME_ENTRY, X509_STORE, X509_VERIFY_PARAM,
    X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH, X509_V_FLAG_CRL_CHECK,
    X509_V_FLAG_PARTIAL_CHAIN, X509_V_OK, libssl_load, tm,
)
from pipeline._system cimport (
    CLOCK_MONOTONIC, EAGAIN, EINTR, EPROTO, MSG_DONTWAIT, MSG_NOSIGNAL, clock_gettime, errno,
    load_int, pthread_atfork, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, recv,
    sched_yield, send, store_int, timespec,
)
from pipeline.tls._tls cimport (
    TLS_FUTILE_BYTES, engine_t, tls_end, tls_is_silent, tls_keep, tls_read, tls_shake, tls_t,
    tls_unlink, tls_write,
)

import calendar
import functools
import ipaddress
import os

from pipeline.errors import UsageError

__all__ = ["Context", "Session", "TLSError"]

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

cdef engine_t engine
if pthread_mutex_init(&engine.lock, NULL) != 0 \
        or pthread_atfork(fork_begins, fork_ends, forked) != 0:
    raise MemoryError
cdef int is_loaded = False          # atomic
cdef BIO_METHOD* method = NULL      # of sockets; made when the library is loaded


class TLSError(OSError):
    """TLS refuses: the handshake, the certificate, the name, or what came. The text says why."""


# -- the library

cdef object load_library():
    """Load OpenSSL, once. Raises ``UsageError`` where there is none."""
    cdef const char* missing = NULL
    cdef bint has_memory = True
    if load_int(&is_loaded):
        return
    with nogil:
        # Of several threads one loads it, and the others wait. Only C state is touched.
        pthread_mutex_lock(&engine.lock)
        if not is_loaded:
            missing = libssl_load(&engine.lib)
            if missing is NULL:
                has_memory = set_up_library()
                store_int(&is_loaded, has_memory)
        pthread_mutex_unlock(&engine.lock)
    if missing is not NULL:
        raise UsageError(
            f"tls: OpenSSL 3 is needed, and {missing.decode()} is not there: install the package "
            "libssl3 (Debian, Ubuntu, Alpine) or openssl-libs (Fedora, RHEL)"
        )
    if not has_memory:
        raise MemoryError


cdef bint set_up_library() noexcept nogil:
    """Prepare OpenSSL, which has just been loaded; False without memory."""
    global method
    engine.lib.OPENSSL_init_ssl(0, NULL)
    # OpenSSL has asked by now to be cleared away at exit, and what is asked later comes first.
    if atexit(wait_for_the_busy) != 0:
        return False
    method = engine.lib.BIO_meth_new(BIO_TYPE_SOURCE_SINK, b"socket of raft-pipeline")
    if method is NULL:
        return False
    engine.lib.BIO_meth_set_read(method, bio_read)
    engine.lib.BIO_meth_set_write(method, bio_write)
    engine.lib.BIO_meth_set_ctrl(method, bio_ctrl)
    return True


cdef void wait_for_the_busy() noexcept nogil:
    """At exit: let nobody into OpenSSL any more; wait for those inside, two seconds at most."""
    cdef timespec begin, now
    cdef tls_t* tls
    store_int(&engine.is_exiting, 1)
    clock_gettime(CLOCK_MONOTONIC, &begin)
    pthread_mutex_lock(&engine.lock)
    tls = engine.first
    while tls is not NULL:
        while load_int(&tls.is_busy):
            sched_yield()
            clock_gettime(CLOCK_MONOTONIC, &now)
            if now.tv_sec - begin.tv_sec > 1:
                break
        tls = tls.next
    pthread_mutex_unlock(&engine.lock)


cdef void fork_begins() noexcept nogil:
    pthread_mutex_lock(&engine.lock)


cdef void fork_ends() noexcept nogil:
    pthread_mutex_unlock(&engine.lock)


cdef void forked() noexcept nogil:
    """In a forked child: whoever was inside OpenSSL has stayed behind, in the middle of it."""
    cdef tls_t* tls = engine.first
    while tls is not NULL:
        if load_int(&tls.is_busy):
            store_int(&tls.is_busy, 0)
            tls.ssl = NULL          # it cannot be freed
            tls.has_failed = True
            tls.error = EPROTO
        tls = tls.next
    pthread_mutex_unlock(&engine.lock)


# -- the BIO: OpenSSL's way to the socket

cdef int bio_read(BIO* bio, char* data, int size) noexcept nogil:
    cdef tls_t* tls = <tls_t*>engine.lib.BIO_get_data(bio)
    cdef ssize_t n = -1
    engine.lib.BIO_clear_flags(
        bio, BIO_FLAGS_READ | BIO_FLAGS_WRITE | BIO_FLAGS_IO_SPECIAL | BIO_FLAGS_SHOULD_RETRY)
    if tls.is_shaken and tls.futile > TLS_FUTILE_BYTES:
        tls.is_drained = False
        engine.lib.BIO_set_flags(bio, BIO_FLAGS_READ | BIO_FLAGS_SHOULD_RETRY)
        return -1
    n = recv(tls.fd, data, size, MSG_DONTWAIT)
    tls.is_drained = n < size
    if n > 0:
        tls.futile += n
        tls.has_heard = tls.is_shaken
    elif n == 0:
        tls.is_eof = True
    elif errno == EAGAIN or errno == EINTR:
        engine.lib.BIO_set_flags(bio, BIO_FLAGS_READ | BIO_FLAGS_SHOULD_RETRY)
    else:
        tls.error = errno
    return <int>n


cdef int bio_write(BIO* bio, const char* data, int size) noexcept nogil:
    """Write to the socket and keep what it does not take, so that OpenSSL's write is done.

    In a handshake OpenSSL keeps it.
    """
    cdef tls_t* tls = <tls_t*>engine.lib.BIO_get_data(bio)
    cdef ssize_t n = -1
    engine.lib.BIO_clear_flags(
        bio, BIO_FLAGS_READ | BIO_FLAGS_WRITE | BIO_FLAGS_IO_SPECIAL | BIO_FLAGS_SHOULD_RETRY)
    if tls.left is NULL:
        n = send(tls.fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL)
        if n < 0 and errno != EAGAIN and errno != EINTR:
            tls.error = errno
            return -1
    if n > 0:
        tls.has_moved = tls.has_left = True
    if not tls.is_shaken:
        tls.wants_to_write = n < 0
        if n < 0:
            engine.lib.BIO_set_flags(bio, BIO_FLAGS_WRITE | BIO_FLAGS_SHOULD_RETRY)
        return <int>n
    if n < 0:
        n = 0
    if n < size:
        tls.error = tls_keep(tls, data + n, size - n)
        if tls.error != 0:
            return -1
    return size


cdef long bio_ctrl(BIO* bio, int command, long number, void* pointer) noexcept nogil:
    return 1 if command == BIO_CTRL_FLUSH else 0


# -- one connection

cdef tls_t* tls_make(SSL_CTX* context, int fd, bint is_client) noexcept nogil:
    """Make the TLS of a connection whose socket does not block; NULL without memory."""
    cdef tls_t* tls = <tls_t*>calloc(1, sizeof(tls_t))
    cdef BIO* bio
    if tls is NULL:
        return NULL
    tls.engine = &engine
    tls.fd = fd
    tls.is_client = is_client
    tls.ssl = engine.lib.SSL_new(context)
    bio = engine.lib.BIO_new(method)
    if tls.ssl is NULL or bio is NULL:
        engine.lib.SSL_free(tls.ssl)
        engine.lib.BIO_free(bio)
        free(tls)
        return NULL
    engine.lib.BIO_set_data(bio, tls)
    engine.lib.BIO_set_init(bio, 1)
    engine.lib.SSL_set_bio(tls.ssl, bio, bio)
    if is_client:
        engine.lib.SSL_set_connect_state(tls.ssl)
    else:
        engine.lib.SSL_set_accept_state(tls.ssl)
    pthread_mutex_lock(&engine.lock)
    tls.next = engine.first
    if engine.first is not NULL:
        engine.first.previous = tls
    engine.first = tls
    pthread_mutex_unlock(&engine.lock)
    return tls


cdef void tls_free(tls_t* tls) noexcept nogil:
    """Free the TLS of a connection; NULL is none. Nothing is sent."""
    if tls is NULL:
        return
    pthread_mutex_lock(&engine.lock)
    tls_unlink(tls)
    # Under the lock: at exit it is let go of before OpenSSL is cleared away.
    if not load_int(&engine.is_exiting):
        engine.lib.SSL_free(tls.ssl)
    pthread_mutex_unlock(&engine.lock)
    free(tls.left)
    free(tls)


cdef str reason_of(tls_t* tls):
    """Put what a connection has failed with into words; empty if it has not."""
    cdef const char* text
    cdef long verified
    if not tls.has_failed:
        return ""
    if tls.error != EPROTO or tls.ssl is NULL:
        return os.strerror(tls.error)
    verified = engine.lib.SSL_get_verify_result(tls.ssl)
    if not tls.is_shaken and verified != X509_V_OK:
        text = engine.lib.X509_verify_cert_error_string(verified)
        return f"certificate verify failed: {text.decode()}"
    text = engine.lib.ERR_reason_error_string(tls.reason)
    return "protocol error" if text is NULL else text.decode()


def session_count():
    """Return how many connections with TLS this process has, for tests."""
    cdef int count = 0
    cdef tls_t* tls
    with nogil:
        # Whoever has the lock may be at work. Only C state is touched.
        pthread_mutex_lock(&engine.lock)
        tls = engine.first
        while tls is not NULL:
            count += 1
            tls = tls.next
        pthread_mutex_unlock(&engine.lock)
    return count


@cython.final
cdef class Session:
    """The TLS of one connection whose socket does not block.

    Made by ``Context.session``. Used by one thread at a time. Nothing here waits, and whatever
    calls OpenSSL for long lets go of the GIL. Raises ``BlockingIOError`` when the socket is not
    ready, ``TLSError`` when TLS fails, else ``OSError``.
    """

    def __dealloc__(self):
        tls_free(self.c)

    @staticmethod
    cdef Session adopt(tls_t* tls):
        cdef Session session = Session.__new__(Session)
        session.c = tls
        return session

    @property
    def is_established(self):
        """Whether the handshake is over."""
        return self.c.is_shaken

    @property
    def has_heard(self):
        """Whether something has come since the handshake, session tickets for one."""
        return self.c.has_heard

    @property
    def has_ended(self):
        """Whether the peer has said that nothing follows."""
        return self.c.has_ended

    @property
    def wants_to_write(self):
        """Whether it goes on once the socket takes more; else once something comes."""
        return self.c.wants_to_write

    @property
    def has_moved(self):
        """Whether the socket took some of what the last ``send`` wrote, be it a part of a record.
        """
        return self.c.has_moved

    @property
    def version(self):
        """The version spoken, "TLSv1.3" for one."""
        if self.c.ssl is NULL:      # in a forked child
            return ""
        return engine.lib.SSL_get_version(self.c.ssl).decode()

    def shake(self):
        """Go on with the handshake; True when it is over, False when more has to come.

        A client's handshake is over before the server has looked at the client's certificate.
        """
        cdef int result
        with nogil:
            # Takes about a millisecond. This thread alone has the session.
            result = tls_shake(self.c)
        if result == 0:
            raise TLSError("the connection ended during the handshake")
        if result < 0 and errno == EAGAIN:
            return False
        if result < 0:
            raise self.failure()
        return True

    def recv_into(self, buffer not None):
        """Read some bytes into ``buffer``; how many, 0 at the end of the stream."""
        cdef Py_buffer view
        cdef ssize_t n = 0
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        try:
            if view.len > 0:
                with nogil:
                    # This thread alone has the session, and the view keeps the memory.
                    n = tls_read(self.c, view.buf, view.len)
                if n < 0:
                    raise self.failure()
        finally:
            PyBuffer_Release(&view)
        return n

    def send(self, data not None):
        """Write some of ``data``; how many bytes.

        What was not taken has to come first, and in full, the next time.
        """
        cdef Py_buffer view
        cdef ssize_t n = 0
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if view.len > 0:
                with nogil:
                    # This thread alone has the session, and the view keeps the memory.
                    n = tls_write(self.c, view.buf, view.len)
                if n < 0:
                    raise self.failure()
        finally:
            PyBuffer_Release(&view)
        return n

    def is_silent(self):
        """Tell whether nothing has come that is not read: no byte, no end, no error."""
        cdef bint is_silent
        with nogil:
            # This thread alone has the session.
            is_silent = tls_is_silent(self.c)
        return is_silent

    def end(self):
        """Tell the peer that nothing follows; False if it cannot be told: reset the connection."""
        cdef bint is_told
        with nogil:
            # This thread alone has the session.
            is_told = tls_end(self.c)
        return is_told

    @property
    def certificate(self):
        """The certificate that the other side has shown and that was verified; None without one.

        A dict, as ``ssl.SSLSocket.getpeercert`` describes it, with subject, issuer, version,
        serialNumber, notBefore, notAfter and subjectAltName. Raises ``TLSError`` if it cannot be
        read: OpenSSL verifies names that are no text.
        """
        return certificate_of(self.c)

    @property
    def reason(self):
        """What it has failed with, in words; empty if it has not."""
        return self.describe_failure()

    cdef object failure(self):
        """Return what to raise, with the errno of a moment ago."""
        cdef int error = errno
        if error == EAGAIN:
            return BlockingIOError(error, os.strerror(error))
        if error == EPROTO:
            return TLSError(self.describe_failure())
        return OSError(error, os.strerror(error))

    cdef str describe_failure(self):
        """As ``reason_of``, and which name it was that the certificate is not valid for."""
        cdef str reason = reason_of(self.c)
        cdef long verified
        if reason and self.name is not None and not self.c.is_shaken and self.c.ssl is not NULL:
            verified = engine.lib.SSL_get_verify_result(self.c.ssl)
            if verified in (X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH):
                return f"{reason}, certificate is not valid for {self.name!r}"
        return reason


# -- contexts

cdef int no_password(char* buffer, int size, int is_writing, void* flag) noexcept nogil:
    """Refuse to ask for a key's password at the terminal."""
    (<int*>flag)[0] = 1
    return -1


cdef object last_failure():
    """Return what OpenSSL says it failed with, for an error's text."""
    cdef unsigned long code = engine.lib.ERR_peek_last_error()
    cdef const char* text = engine.lib.ERR_reason_error_string(code)
    return "it cannot be read" if text is NULL else text.decode()


cdef object open_file(str name, path):
    """Raise what keeps a file from being read, which OpenSSL has only numbers for."""
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise OSError(f"{name}: {error}") from error


@functools.lru_cache(1024)
def proof(str name):
    """Return what OpenSSL is to look for in a certificate, and whether that is an address."""
    try:
        return str(ipaddress.ip_address(name)).encode(), True
    except ValueError:
        return name.encode("idna"), False


cdef object expect_name(tls_t* tls, str name):
    """Have the server prove a name. Raises ``UnicodeError`` if it is none."""
    cdef X509_VERIFY_PARAM* rules = engine.lib.SSL_get0_param(tls.ssl)
    cdef bytes text
    text, is_address = proof(name)
    if not is_address:
        # As in Go: "*" stands for a whole label, and the common name for nothing.
        engine.lib.X509_VERIFY_PARAM_set_hostflags(
            rules, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS | X509_CHECK_FLAG_NEVER_CHECK_SUBJECT)
        if not engine.lib.X509_VERIFY_PARAM_set1_host(rules, text, len(text)) \
                or not engine.lib.SSL_ctrl(
                    tls.ssl, SSL_CTRL_SET_TLSEXT_HOSTNAME, TLSEXT_NAMETYPE_host_name,
                    <void*><char*>text):
            raise TLSError(f"{name!r} is not a name that a certificate can prove")
    else:
        if not engine.lib.X509_VERIFY_PARAM_set1_ip_asc(rules, text):
            raise TLSError(f"{name!r} is not a name that a certificate can prove")


cdef object set_up(SSL_CTX* context, bint is_server, str min_version, bint asks_for_certificate):
    """Set what does not come from files."""
    cdef int verify = SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT
    cdef int version = TLS1_3_VERSION if min_version == "1.3" else TLS1_2_VERSION
    # No ALPN: etcd 3.4 serves its gRPC by HTTP/2 on the same port, and so is not to be asked
    # for h2.
    engine.lib.SSL_CTX_ctrl(context, SSL_CTRL_SET_MIN_PROTO_VERSION, version, NULL)
    # Every handshake is to verify the certificate of this day; no session outlives a rotation.
    engine.lib.SSL_CTX_set_options(
        context, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION)
    engine.lib.SSL_CTX_set_num_tickets(context, 0)
    engine.lib.SSL_CTX_ctrl(context, SSL_CTRL_SET_SESS_CACHE_MODE, SSL_SESS_CACHE_OFF, NULL)
    # SSL_write writes one record, which tls_write counts on; what the socket does not take is
    # kept below OpenSSL. An idle connection has no buffers. One read of the socket takes the head
    # of a record and the rest of it.
    engine.lib.SSL_CTX_ctrl(
        context, SSL_CTRL_MODE,
        SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER
        | SSL_MODE_RELEASE_BUFFERS, NULL)
    engine.lib.SSL_CTX_ctrl(context, SSL_CTRL_SET_READ_AHEAD, 1, NULL)
    if is_server and not asks_for_certificate:
        verify = SSL_VERIFY_NONE
    engine.lib.SSL_CTX_set_verify(context, verify, NULL)
    # As in Go, whatever is in the CA file is an anchor, an intermediate as well. Not
    # X509_V_FLAG_X509_STRICT: Go takes certificates without key identifiers, and clusters have
    # such.
    engine.lib.X509_VERIFY_PARAM_set_flags(
        engine.lib.SSL_CTX_get0_param(context), X509_V_FLAG_PARTIAL_CHAIN)


cdef object load_chain(SSL_CTX* context, cert_file, key_file):
    cdef int is_encrypted = 0
    cdef bytes cert = os.fsencode(cert_file)
    cdef bytes key = os.fsencode(key_file)
    open_file("cert_file, key_file", cert_file)
    open_file("cert_file, key_file", key_file)
    engine.lib.ERR_clear_error()
    engine.lib.SSL_CTX_set_default_passwd_cb(context, no_password)
    engine.lib.SSL_CTX_set_default_passwd_cb_userdata(context, &is_encrypted)
    try:
        if not engine.lib.SSL_CTX_use_certificate_chain_file(context, cert):
            raise OSError(f"cert_file, key_file: {os.fspath(cert_file)!r}: {last_failure()}")
        if not engine.lib.SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM):
            if is_encrypted:
                raise OSError("cert_file, key_file: the key is encrypted")
            raise OSError(f"cert_file, key_file: {os.fspath(key_file)!r}: {last_failure()}")
        if not engine.lib.SSL_CTX_check_private_key(context):
            raise OSError(f"cert_file, key_file: {last_failure()}")
    finally:
        engine.lib.SSL_CTX_set_default_passwd_cb_userdata(context, NULL)
        engine.lib.SSL_CTX_set_default_passwd_cb(context, NULL)
        engine.lib.ERR_clear_error()


cdef object load_authorities(SSL_CTX* context, file):
    cdef bytes path = os.fsencode(file)
    open_file("trusted_ca_file", file)
    engine.lib.ERR_clear_error()
    try:
        if not engine.lib.SSL_CTX_load_verify_file(context, path):
            raise OSError(f"trusted_ca_file: {os.fspath(file)!r}: {last_failure()}")
    finally:
        engine.lib.ERR_clear_error()


cdef object load_crl(SSL_CTX* context, file):
    """Load revocation lists, and nothing else: a certificate among them would be trusted."""
    cdef X509_STORE* store = engine.lib.SSL_CTX_get_cert_store(context)
    cdef bytes path = os.fsencode(file)
    cdef X509_CRL* crl
    cdef X509* certificate
    cdef BIO* bio
    cdef int lists = 0
    open_file("crl_file", file)
    engine.lib.ERR_clear_error()
    try:
        bio = engine.lib.BIO_new_file(path, b"r")
        if bio is NULL:
            raise OSError(f"crl_file: {os.fspath(file)!r}: {last_failure()}")
        certificate = engine.lib.PEM_read_bio_X509(bio, NULL, NULL, NULL)
        engine.lib.X509_free(certificate)
        engine.lib.BIO_free(bio)
        if certificate is not NULL:
            raise OSError("crl_file: holds certificates")
        engine.lib.ERR_clear_error()
        bio = engine.lib.BIO_new_file(path, b"r")
        if bio is NULL:
            raise OSError(f"crl_file: {os.fspath(file)!r}: {last_failure()}")
        while True:
            crl = engine.lib.PEM_read_bio_X509_CRL(bio, NULL, NULL, NULL)
            if crl is NULL:
                break
            lists += engine.lib.X509_STORE_add_crl(store, crl)
            engine.lib.X509_CRL_free(crl)
        engine.lib.BIO_free(bio)
        # With a list left out its certificates would be let in, those of its day and later ones.
        if not is_end_of_pem():
            raise OSError(f"crl_file: {os.fspath(file)!r}: {last_failure()}")
        if lists == 0:
            raise OSError("crl_file: holds no revocation list")
    finally:
        engine.lib.ERR_clear_error()
    engine.lib.X509_VERIFY_PARAM_set_flags(
        engine.lib.SSL_CTX_get0_param(context), X509_V_FLAG_CRL_CHECK)


cdef bint is_end_of_pem() noexcept:
    """Tell whether OpenSSL has failed because nothing more of the kind is in the file."""
    cdef unsigned long code = engine.lib.ERR_peek_last_error()
    return code >> 23 & 0xFF == ERR_LIB_PEM and code & 0x7FFFFF == PEM_R_NO_START_LINE


@cython.final
cdef class Context:
    """What connections of one direction are made from: our certificate and key, and whom we trust.

    Parameters
    ----------
    is_server : bool
        Whether for connections that we accept.
    cert_file, key_file : path
    trusted_ca_file, crl_file : path or None
        Without the first servers are checked against the system's authorities.
    min_version : str
        "1.2" or "1.3".
    asks_for_certificate : bool
        Whether the other side must show a certificate. Servers always must.

    Raises
    ------
    OSError
        If a file cannot be read, or is no good; the text says which.
    UsageError
        If there is no OpenSSL 3.

    Notes
    -----
    Thread-safe. Made of the files as they are; blocks while they are read.
    """

    def __cinit__(
        self,
        *,
        bint is_server,
        cert_file not None,
        key_file not None,
        trusted_ca_file,
        crl_file,
        str min_version not None,
        bint asks_for_certificate,
    ):
        load_library()
        self.is_server = is_server
        self.c = engine.lib.SSL_CTX_new(engine.lib.TLS_method())
        if self.c is NULL:
            raise MemoryError
        set_up(self.c, is_server, min_version, asks_for_certificate)
        load_chain(self.c, cert_file, key_file)
        self.not_after = seconds_of(
            engine.lib.X509_get0_notAfter(engine.lib.SSL_CTX_get0_certificate(self.c)))
        if trusted_ca_file is not None:
            load_authorities(self.c, trusted_ca_file)
        elif not is_server:
            engine.lib.SSL_CTX_set_default_verify_paths(self.c)
        if crl_file is not None:
            load_crl(self.c, crl_file)

    def __dealloc__(self):
        if self.c is not NULL and not load_int(&engine.is_exiting):
            engine.lib.SSL_CTX_free(self.c)

    def session(self, int fd, str name=None):
        """Make the TLS of a connection: a :class:`Session`.

        Parameters
        ----------
        fd : int
            The socket, connected, which does not block and stays the caller's.
        name : str, optional
            Of a client: the host name or address that the server must prove; SNI, if a name.
        """
        session = Session.adopt(self.open(fd, name))
        session.name = name
        return session

    cdef tls_t* open(self, int fd, str name) except NULL:
        """Make the TLS of a connection, which is the caller's."""
        cdef tls_t* tls = tls_make(self.c, fd, not self.is_server)
        if tls is NULL:
            raise MemoryError
        try:
            if name is not None:
                expect_name(tls, name)
        except BaseException:
            tls_free(tls)
            engine.lib.ERR_clear_error()    # as in tls_failed
            raise
        return tls

# -- certificates

cdef object certificate_of(tls_t* tls):
    """Describe the certificate that the other side has shown, as ``Session.certificate`` says."""
    cdef X509* certificate = engine.lib.SSL_get1_peer_certificate(tls.ssl)
    if certificate is NULL:
        return None
    try:
        return describe(certificate)
    except ValueError as error:     # UnicodeDecodeError
        raise TLSError(f"certificate refused: it cannot be read: {error}") from error
    finally:
        engine.lib.X509_free(certificate)


cdef object describe(X509* certificate):
    cdef const ASN1_STRING* serial = engine.lib.X509_get0_serialNumber(certificate)
    cdef str sign = "-" if engine.lib.ASN1_STRING_type(serial) & V_ASN1_NEG else ""
    described = {
        "subject": describe_name(engine.lib.X509_get_subject_name(certificate)),
        "issuer": describe_name(engine.lib.X509_get_issuer_name(certificate)),
        "version": engine.lib.X509_get_version(certificate) + 1,
        "serialNumber": sign + raw(serial).hex().upper(),
        "notBefore": describe_time(engine.lib.X509_get0_notBefore(certificate)),
        "notAfter": describe_time(engine.lib.X509_get0_notAfter(certificate)),
    }
    names = alternative_names(certificate)
    if names:
        described["subjectAltName"] = names
    return described


cdef object describe_name(X509_NAME* name):
    """Return a tuple of relative names, each a tuple of (kind, value)."""
    cdef X509_NAME_ENTRY* entry
    cdef unsigned char* text
    cdef char kind[256]
    cdef int i, n, at, last = -1
    parts, part = [], []
    for i in range(engine.lib.X509_NAME_entry_count(name)):
        entry = engine.lib.X509_NAME_get_entry(name, i)
        engine.lib.OBJ_obj2txt(
            kind, sizeof(kind), engine.lib.X509_NAME_ENTRY_get_object(entry), 0)
        n = engine.lib.ASN1_STRING_to_UTF8(&text, engine.lib.X509_NAME_ENTRY_get_data(entry))
        if n < 0:
            engine.lib.ERR_clear_error()
            raise ValueError("a name is no text")
        try:
            value = text[:n].decode()
        finally:
            engine.lib.CRYPTO_free(text, b"", 0)
        at = engine.lib.X509_NAME_ENTRY_set(entry)
        if at != last:
            part = []
            parts.append(part)
            last = at
        part.append(((<char*>kind).decode(), value))
    return tuple(tuple(part) for part in parts)


cdef object alternative_names(X509* certificate):
    """Return a tuple of (kind, value)."""
    cdef OPENSSL_STACK* stack = <OPENSSL_STACK*>engine.lib.X509_get_ext_d2i(
        certificate, NID_subject_alt_name, NULL, NULL)
    cdef void* value
    cdef int i, kind
    if stack is NULL:
        engine.lib.ERR_clear_error()
        return ()
    names = []
    try:
        for i in range(engine.lib.OPENSSL_sk_num(stack)):
            value = engine.lib.GENERAL_NAME_get0_value(
                <GENERAL_NAME*>engine.lib.OPENSSL_sk_value(stack, i), &kind)
            if kind == GEN_DNS:
                names.append(("DNS", raw(<ASN1_STRING*>value).decode()))
            elif kind == GEN_URI:
                names.append(("URI", raw(<ASN1_STRING*>value).decode()))
            elif kind == GEN_EMAIL:
                names.append(("email", raw(<ASN1_STRING*>value).decode()))
            elif kind == GEN_IPADD:
                names.append(("IP Address", describe_address(raw(<ASN1_STRING*>value))))
            elif kind == GEN_DIRNAME:
                names.append(("DirName", describe_name(<X509_NAME*>value)))
            else:
                names.append(
                    ("Registered ID" if kind == GEN_RID else "othername", "<unsupported>"))
    finally:
        engine.lib.OPENSSL_sk_pop_free(
            stack, <void (*)(void*) noexcept nogil>engine.lib.GENERAL_NAME_free)
    return tuple(names)


cdef str describe_address(bytes packed):
    return str(ipaddress.ip_address(packed)) if len(packed) in (4, 16) else "<invalid>"


cdef bytes raw(const ASN1_STRING* text):
    return engine.lib.ASN1_STRING_get0_data(text)[:engine.lib.ASN1_STRING_length(text)]


cdef str describe_time(const ASN1_TIME* time):
    """Write a time as ``ssl`` does: "Jun  1 12:00:00 2030 GMT"."""
    cdef tm t
    if not engine.lib.ASN1_TIME_to_tm(time, &t):
        raise ValueError("a time is none")
    return (f"{_MONTHS[t.tm_mon]} {t.tm_mday:2} {t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02} "
            f"{t.tm_year + 1900} GMT")


cdef double seconds_of(const ASN1_TIME* time) except? -1:
    """Return a time as seconds since the epoch."""
    cdef tm t
    if not engine.lib.ASN1_TIME_to_tm(time, &t):
        raise OSError("cert_file: its end of validity cannot be read")
    return calendar.timegm(
        (t.tm_year + 1900, t.tm_mon + 1, t.tm_mday, t.tm_hour, t.tm_min, t.tm_sec))
