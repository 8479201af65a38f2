/* The functions of OpenSSL 3 that we call, and where they are once the library is loaded.

   The prototypes are ours, so nothing of OpenSSL is needed to compile us. `make lint` compiles this
   file against OpenSSL's own headers, where these are installed, with LIBSSL_CHECK defined: then a
   prototype that differs from theirs does not pass. */

#ifndef PIPELINE_LIBSSL_H
#define PIPELINE_LIBSSL_H

#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#ifdef LIBSSL_CHECK
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>
#else
typedef struct ssl_st SSL;
typedef struct ssl_ctx_st SSL_CTX;
typedef struct ssl_method_st SSL_METHOD;
typedef struct ossl_init_settings_st OPENSSL_INIT_SETTINGS;
typedef struct bio_st BIO;
typedef struct bio_method_st BIO_METHOD;
typedef struct x509_st X509;
typedef struct X509_crl_st X509_CRL;
typedef struct x509_store_st X509_STORE;
typedef struct x509_store_ctx_st X509_STORE_CTX;
typedef struct X509_VERIFY_PARAM_st X509_VERIFY_PARAM;
typedef struct X509_name_st X509_NAME;
typedef struct X509_name_entry_st X509_NAME_ENTRY;
typedef struct asn1_object_st ASN1_OBJECT;
typedef struct asn1_string_st ASN1_STRING;
typedef struct asn1_string_st ASN1_INTEGER;
typedef struct asn1_string_st ASN1_TIME;
typedef struct GENERAL_NAME_st GENERAL_NAME;
typedef struct stack_st OPENSSL_STACK;
typedef int (*SSL_verify_cb)(int, X509_STORE_CTX *);
typedef int pem_password_cb(char *, int, int, void *);
#endif

/* F(what it returns, its name, its parameters) */
#define LIBSSL_FUNCTIONS(F) \
    F(int, OPENSSL_init_ssl, (uint64_t, const OPENSSL_INIT_SETTINGS *)) \
    F(const SSL_METHOD *, TLS_method, (void)) \
    F(SSL_CTX *, SSL_CTX_new, (const SSL_METHOD *)) \
    F(void, SSL_CTX_free, (SSL_CTX *)) \
    F(long, SSL_CTX_ctrl, (SSL_CTX *, int, long, void *)) \
    F(uint64_t, SSL_CTX_set_options, (SSL_CTX *, uint64_t)) \
    F(int, SSL_CTX_set_num_tickets, (SSL_CTX *, size_t)) \
    F(void, SSL_CTX_set_verify, (SSL_CTX *, int, SSL_verify_cb)) \
    F(int, SSL_CTX_load_verify_file, (SSL_CTX *, const char *)) \
    F(int, SSL_CTX_set_default_verify_paths, (SSL_CTX *)) \
    F(void, SSL_CTX_set_default_passwd_cb, (SSL_CTX *, pem_password_cb *)) \
    F(void, SSL_CTX_set_default_passwd_cb_userdata, (SSL_CTX *, void *)) \
    F(int, SSL_CTX_use_certificate_chain_file, (SSL_CTX *, const char *)) \
    F(int, SSL_CTX_use_PrivateKey_file, (SSL_CTX *, const char *, int)) \
    F(int, SSL_CTX_check_private_key, (const SSL_CTX *)) \
    F(X509 *, SSL_CTX_get0_certificate, (const SSL_CTX *)) \
    F(X509_STORE *, SSL_CTX_get_cert_store, (const SSL_CTX *)) \
    F(X509_VERIFY_PARAM *, SSL_CTX_get0_param, (SSL_CTX *)) \
    F(SSL *, SSL_new, (SSL_CTX *)) \
    F(void, SSL_free, (SSL *)) \
    F(void, SSL_set_bio, (SSL *, BIO *, BIO *)) \
    F(void, SSL_set_connect_state, (SSL *)) \
    F(void, SSL_set_accept_state, (SSL *)) \
    F(long, SSL_ctrl, (SSL *, int, long, void *)) \
    F(X509_VERIFY_PARAM *, SSL_get0_param, (SSL *)) \
    F(int, SSL_do_handshake, (SSL *)) \
    F(int, SSL_read, (SSL *, void *, int)) \
    F(int, SSL_peek, (SSL *, void *, int)) \
    F(int, SSL_write, (SSL *, const void *, int)) \
    F(int, SSL_shutdown, (SSL *)) \
    F(int, SSL_get_error, (const SSL *, int)) \
    F(int, SSL_has_pending, (const SSL *)) \
    F(long, SSL_get_verify_result, (const SSL *)) \
    F(const char *, SSL_get_version, (const SSL *)) \
    F(X509 *, SSL_get1_peer_certificate, (const SSL *)) \
    F(unsigned long, ERR_peek_last_error, (void)) \
    F(void, ERR_clear_error, (void)) \
    F(const char *, ERR_reason_error_string, (unsigned long)) \
    F(const char *, X509_verify_cert_error_string, (long)) \
    F(BIO_METHOD *, BIO_meth_new, (int, const char *)) \
    F(int, BIO_meth_set_read, (BIO_METHOD *, int (*)(BIO *, char *, int))) \
    F(int, BIO_meth_set_write, (BIO_METHOD *, int (*)(BIO *, const char *, int))) \
    F(int, BIO_meth_set_ctrl, (BIO_METHOD *, long (*)(BIO *, int, long, void *))) \
    F(BIO *, BIO_new, (const BIO_METHOD *)) \
    F(BIO *, BIO_new_file, (const char *, const char *)) \
    F(int, BIO_free, (BIO *)) \
    F(void, BIO_set_data, (BIO *, void *)) \
    F(void *, BIO_get_data, (BIO *)) \
    F(void, BIO_set_init, (BIO *, int)) \
    F(void, BIO_set_flags, (BIO *, int)) \
    F(void, BIO_clear_flags, (BIO *, int)) \
    F(X509 *, PEM_read_bio_X509, (BIO *, X509 **, pem_password_cb *, void *)) \
    F(X509_CRL *, PEM_read_bio_X509_CRL, (BIO *, X509_CRL **, pem_password_cb *, void *)) \
    F(int, X509_STORE_add_crl, (X509_STORE *, X509_CRL *)) \
    F(int, X509_VERIFY_PARAM_set_flags, (X509_VERIFY_PARAM *, unsigned long)) \
    F(void, X509_VERIFY_PARAM_set_hostflags, (X509_VERIFY_PARAM *, unsigned int)) \
    F(int, X509_VERIFY_PARAM_set1_host, (X509_VERIFY_PARAM *, const char *, size_t)) \
    F(int, X509_VERIFY_PARAM_set1_ip_asc, (X509_VERIFY_PARAM *, const char *)) \
    F(void, X509_free, (X509 *)) \
    F(void, X509_CRL_free, (X509_CRL *)) \
    F(long, X509_get_version, (const X509 *)) \
    F(const ASN1_INTEGER *, X509_get0_serialNumber, (const X509 *)) \
    F(const ASN1_TIME *, X509_get0_notBefore, (const X509 *)) \
    F(const ASN1_TIME *, X509_get0_notAfter, (const X509 *)) \
    F(X509_NAME *, X509_get_subject_name, (const X509 *)) \
    F(X509_NAME *, X509_get_issuer_name, (const X509 *)) \
    F(void *, X509_get_ext_d2i, (const X509 *, int, int *, int *)) \
    F(int, X509_NAME_entry_count, (const X509_NAME *)) \
    F(X509_NAME_ENTRY *, X509_NAME_get_entry, (const X509_NAME *, int)) \
    F(ASN1_OBJECT *, X509_NAME_ENTRY_get_object, (const X509_NAME_ENTRY *)) \
    F(ASN1_STRING *, X509_NAME_ENTRY_get_data, (const X509_NAME_ENTRY *)) \
    F(int, X509_NAME_ENTRY_set, (const X509_NAME_ENTRY *)) \
    F(int, OBJ_obj2txt, (char *, int, const ASN1_OBJECT *, int)) \
    F(int, ASN1_STRING_to_UTF8, (unsigned char **, const ASN1_STRING *)) \
    F(const unsigned char *, ASN1_STRING_get0_data, (const ASN1_STRING *)) \
    F(int, ASN1_STRING_length, (const ASN1_STRING *)) \
    F(int, ASN1_STRING_type, (const ASN1_STRING *)) \
    F(int, ASN1_TIME_to_tm, (const ASN1_TIME *, struct tm *)) \
    F(int, OPENSSL_sk_num, (const OPENSSL_STACK *)) \
    F(void *, OPENSSL_sk_value, (const OPENSSL_STACK *, int)) \
    F(void, OPENSSL_sk_pop_free, (OPENSSL_STACK *, void (*)(void *))) \
    F(void *, GENERAL_NAME_get0_value, (const GENERAL_NAME *, int *)) \
    F(void, GENERAL_NAME_free, (GENERAL_NAME *)) \
    F(void, CRYPTO_free, (void *, const char *, int))

/* What OpenSSL has as macros over SSL_ctrl and SSL_CTX_ctrl, and the values it takes and gives. */
#define LIBSSL_CONSTANTS(C) \
    C(SSL_CTRL_MODE, 33) \
    C(SSL_CTRL_SET_READ_AHEAD, 41) \
    C(SSL_CTRL_SET_SESS_CACHE_MODE, 44) \
    C(SSL_CTRL_SET_TLSEXT_HOSTNAME, 55) \
    C(SSL_CTRL_SET_MIN_PROTO_VERSION, 123) \
    C(TLSEXT_NAMETYPE_host_name, 0) \
    C(TLS1_2_VERSION, 0x0303) \
    C(TLS1_3_VERSION, 0x0304) \
    C(SSL_MODE_ENABLE_PARTIAL_WRITE, 1) \
    C(SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER, 2) \
    C(SSL_MODE_RELEASE_BUFFERS, 16) \
    C(SSL_SESS_CACHE_OFF, 0) \
    C(SSL_VERIFY_NONE, 0) \
    C(SSL_VERIFY_PEER, 1) \
    C(SSL_VERIFY_FAIL_IF_NO_PEER_CERT, 2) \
    C(SSL_OP_NO_TICKET, 1 << 14) \
    C(SSL_OP_NO_COMPRESSION, 1 << 17) \
    C(SSL_OP_NO_RENEGOTIATION, 1 << 30) \
    C(SSL_FILETYPE_PEM, 1) \
    C(SSL_ERROR_WANT_READ, 2) \
    C(SSL_ERROR_WANT_WRITE, 3) \
    C(SSL_ERROR_SYSCALL, 5) \
    C(SSL_ERROR_ZERO_RETURN, 6) \
    C(BIO_TYPE_SOURCE_SINK, 0x0400) \
    C(BIO_FLAGS_READ, 1) \
    C(BIO_FLAGS_WRITE, 2) \
    C(BIO_FLAGS_IO_SPECIAL, 4) \
    C(BIO_FLAGS_SHOULD_RETRY, 8) \
    C(BIO_CTRL_FLUSH, 11) \
    C(X509_V_OK, 0) \
    C(X509_V_ERR_HOSTNAME_MISMATCH, 62) \
    C(X509_V_ERR_IP_ADDRESS_MISMATCH, 64) \
    C(X509_V_FLAG_CRL_CHECK, 0x4) \
    C(X509_V_FLAG_PARTIAL_CHAIN, 0x80000) \
    C(X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS, 0x4) \
    C(X509_CHECK_FLAG_NEVER_CHECK_SUBJECT, 0x20) \
    C(ERR_LIB_PEM, 9) \
    C(PEM_R_NO_START_LINE, 108) \
    C(V_ASN1_NEG, 0x100) \
    C(NID_subject_alt_name, 85) \
    C(GEN_EMAIL, 1) \
    C(GEN_DNS, 2) \
    C(GEN_DIRNAME, 4) \
    C(GEN_URI, 6) \
    C(GEN_IPADD, 7) \
    C(GEN_RID, 8)

#ifdef LIBSSL_CHECK
#define LIBSSL_CHECK_FUNCTION(returns, name, parameters) \
    _Static_assert(__builtin_types_compatible_p(__typeof__(&name), returns (*) parameters), \
                   "the prototype of " #name " is not OpenSSL's");
LIBSSL_FUNCTIONS(LIBSSL_CHECK_FUNCTION)
#define LIBSSL_CHECK_CONSTANT(name, value) \
    _Static_assert((long long)(name) == (long long)(value), "the value of " #name " is not OpenSSL's");
LIBSSL_CONSTANTS(LIBSSL_CHECK_CONSTANT)
#else
#define LIBSSL_ENUMERATOR(name, value) name = (value),
enum { LIBSSL_CONSTANTS(LIBSSL_ENUMERATOR) };
#endif

#define LIBSSL_MEMBER(returns, name, parameters) returns (*name) parameters;
typedef struct libssl_t {
    LIBSSL_FUNCTIONS(LIBSSL_MEMBER)
} libssl_t;

/* Find the functions in libssl.so.3 and the libcrypto that it brings; NULL, or what is missing. */
static inline const char *libssl_load(libssl_t *lib)
{
    /* Not global: a Python that has an OpenSSL of its own keeps to that. */
    void *handle = dlopen("libssl.so.3", RTLD_NOW | RTLD_LOCAL);
    if (handle == NULL)
        return "libssl.so.3";
#define LIBSSL_FIND(returns, name, parameters) \
    *(void **)&lib->name = dlsym(handle, #name); \
    if (lib->name == NULL) \
        return #name;
    LIBSSL_FUNCTIONS(LIBSSL_FIND)
    return NULL;
}

#endif
