/* The bytes of a connection: the socket's own, or with -DTLS what OpenSSL makes of them.
 *
 * With -DTLS both sides show a certificate and speak TLS 1.3 with one cipher suite, so that no
 * figure depends on which suite two programs like best. A small request is one record; a large body
 * is encrypted from where it lies; what was read ahead of a record is not read again. Any of these
 * functions returns -1 with errno EAGAIN where it would have to wait.
 */
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#ifdef TLS
#include <openssl/err.h>
#include <openssl/ssl.h>

enum {
    RECORD_CAP = 16 * 1024, /* the most that one record carries (RFC 8446, 5.1) */
    AHEAD_CAP = 128 * 1024, /* read from the socket at once: eight records of a large body */
};

static SSL_CTX *context;
static const char *cert_file, *ca_file; /* the first has the key as well */

typedef struct {
    int fd;
    SSL *ssl;
} wire_t;

static inline bool wire_setup(bool is_server)
{
    context = SSL_CTX_new(is_server ? TLS_server_method() : TLS_client_method());
    if (!cert_file || !ca_file || !context ||
        !SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) ||
        !SSL_CTX_set_ciphersuites(context, "TLS_AES_128_GCM_SHA256") ||
        SSL_CTX_use_certificate_chain_file(context, cert_file) != 1 ||
        SSL_CTX_use_PrivateKey_file(context, cert_file, SSL_FILETYPE_PEM) != 1 ||
        SSL_CTX_load_verify_file(context, ca_file) != 1) {
        ERR_print_errors_fp(stderr);
        return false;
    }
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    SSL_CTX_set_num_tickets(context, 0);
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_read_ahead(context, 1);
    SSL_CTX_set_default_read_buffer_len(context, AHEAD_CAP);
    signal(SIGPIPE, SIG_IGN); /* OpenSSL writes to the socket without MSG_NOSIGNAL */
    return true;
}

/* A client's socket may wait, and shakes hands here; a server's does with its first reads. */
static inline bool wire_begin(wire_t *w, int fd, bool is_server)
{
    w->fd = fd;
    w->ssl = SSL_new(context);
    if (!w->ssl || !SSL_set_fd(w->ssl, fd))
        return false;
    if (is_server) {
        SSL_set_accept_state(w->ssl);
        return true;
    }
    return X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(w->ssl), "127.0.0.1") == 1 &&
           SSL_connect(w->ssl) == 1;
}

static inline bool wire_has_shaken_hands(const wire_t *w)
{
    return SSL_is_init_finished(w->ssl);
}

/* Says goodbye to a peer that is still there; the socket is left to the caller. */
static inline void wire_end(wire_t *w)
{
    if (wire_has_shaken_hands(w))
        SSL_shutdown(w->ssl);
    ERR_clear_error();
    SSL_free(w->ssl);
}

/* Whether bytes that epoll no longer knows of have been read from the socket. */
static inline bool wire_holds_bytes(const wire_t *w)
{
    return SSL_has_pending(w->ssl);
}

/* What a read or write that gave nothing is to its caller: 0 at the end, else -1 and errno. */
static inline ssize_t wire_outcome(wire_t *w, int result)
{
    int error = SSL_get_error(w->ssl, result);
    if (error == SSL_ERROR_ZERO_RETURN)
        return 0;
    if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE) {
        errno = EAGAIN;
    } else {
        ERR_clear_error();
        errno = EPROTO;
    }
    return -1;
}

static inline ssize_t wire_read(wire_t *w, void *into, size_t room)
{
    int n = SSL_read(w->ssl, into, (int)room);
    return n > 0 ? n : wire_outcome(w, n);
}

static inline ssize_t wire_send(wire_t *w, const void *bytes, size_t len)
{
    int n = SSL_write(w->ssl, bytes, (int)len);
    return n > 0 ? n : wire_outcome(w, n);
}

static inline ssize_t wire_write(wire_t *w, const struct iovec *iov, int n_iov)
{
    static _Thread_local char record[RECORD_CAP]; /* the head, and what fits beside it */
    const struct iovec *last = &iov[n_iov - 1];
    size_t skipped = 0;
    ssize_t done = 0, n = 0;
    if (n_iov == 2) {
        skipped = RECORD_CAP - iov->iov_len;
        if (skipped > last->iov_len)
            skipped = last->iov_len;
        memcpy(record, iov->iov_base, iov->iov_len);
        memcpy(record + iov->iov_len, last->iov_base, skipped);
        if ((done = wire_send(w, record, iov->iov_len + skipped)) < 0)
            return done;
    }
    for (; skipped < last->iov_len; skipped += (size_t)n, done += n)
        if ((n = wire_send(w, (char *)last->iov_base + skipped, last->iov_len - skipped)) < 0)
            return done ? done : n;
    return done;
}

#else

typedef struct {
    int fd;
} wire_t;

static inline bool wire_setup(bool is_server)
{
    (void)is_server;
    return true;
}

static inline bool wire_begin(wire_t *w, int fd, bool is_server)
{
    (void)is_server;
    w->fd = fd;
    return true;
}

static inline bool wire_has_shaken_hands(const wire_t *w)
{
    (void)w;
    return false;
}

static inline void wire_end(wire_t *w)
{
    (void)w;
}

static inline bool wire_holds_bytes(const wire_t *w)
{
    (void)w;
    return false;
}

static inline ssize_t wire_read(wire_t *w, void *into, size_t room)
{
    return recv(w->fd, into, room, 0);
}

static inline ssize_t wire_send(wire_t *w, const void *bytes, size_t len)
{
    return send(w->fd, bytes, len, MSG_NOSIGNAL);
}

static inline ssize_t wire_write(wire_t *w, const struct iovec *iov, int n_iov)
{
    return writev(w->fd, iov, n_iov);
}

#endif
