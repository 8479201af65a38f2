"""OpenSSL's functions and values, as ``libssl.h`` declares them."""

from libc.stdint cimport uint64_t


cdef extern from "<time.h>" nogil:
    struct tm:
        int tm_sec
        int tm_min
        int tm_hour
        int tm_mday
        int tm_mon
        int tm_year

cdef extern from "libssl.h" nogil:
    ctypedef struct SSL
    ctypedef struct SSL_CTX
    ctypedef struct SSL_METHOD
    ctypedef struct BIO
    ctypedef struct BIO_METHOD
    ctypedef struct X509
    ctypedef struct X509_CRL
    ctypedef struct X509_STORE
    ctypedef struct X509_VERIFY_PARAM
    ctypedef struct X509_NAME
    ctypedef struct X509_NAME_ENTRY
    ctypedef struct ASN1_OBJECT
    ctypedef struct ASN1_STRING
    ctypedef struct ASN1_TIME
    ctypedef struct GENERAL_NAME
    ctypedef struct OPENSSL_STACK

    ctypedef struct libssl_t:
        int (*OPENSSL_init_ssl)(uint64_t, const void*) noexcept nogil
        const SSL_METHOD* (*TLS_method)() noexcept nogil
        SSL_CTX* (*SSL_CTX_new)(const SSL_METHOD*) noexcept nogil
        void (*SSL_CTX_free)(SSL_CTX*) noexcept nogil
        long (*SSL_CTX_ctrl)(SSL_CTX*, int, long, void*) noexcept nogil
        uint64_t (*SSL_CTX_set_options)(SSL_CTX*, uint64_t) noexcept nogil
        int (*SSL_CTX_set_num_tickets)(SSL_CTX*, size_t) noexcept nogil
        void (*SSL_CTX_set_verify)(SSL_CTX*, int, void*) noexcept nogil
        int (*SSL_CTX_load_verify_file)(SSL_CTX*, const char*) noexcept nogil
        int (*SSL_CTX_set_default_verify_paths)(SSL_CTX*) noexcept nogil
        void (*SSL_CTX_set_default_passwd_cb)(
            SSL_CTX*, int (*)(char*, int, int, void*) noexcept nogil) noexcept nogil
        void (*SSL_CTX_set_default_passwd_cb_userdata)(SSL_CTX*, void*) noexcept nogil
        int (*SSL_CTX_use_certificate_chain_file)(SSL_CTX*, const char*) noexcept nogil
        int (*SSL_CTX_use_PrivateKey_file)(SSL_CTX*, const char*, int) noexcept nogil
        int (*SSL_CTX_check_private_key)(const SSL_CTX*) noexcept nogil
        X509* (*SSL_CTX_get0_certificate)(const SSL_CTX*) noexcept nogil
        X509_STORE* (*SSL_CTX_get_cert_store)(const SSL_CTX*) noexcept nogil
        X509_VERIFY_PARAM* (*SSL_CTX_get0_param)(SSL_CTX*) noexcept nogil
        SSL* (*SSL_new)(SSL_CTX*) noexcept nogil
        void (*SSL_free)(SSL*) noexcept nogil
        void (*SSL_set_bio)(SSL*, BIO*, BIO*) noexcept nogil
        void (*SSL_set_connect_state)(SSL*) noexcept nogil
        void (*SSL_set_accept_state)(SSL*) noexcept nogil
        long (*SSL_ctrl)(SSL*, int, long, void*) noexcept nogil
        X509_VERIFY_PARAM* (*SSL_get0_param)(SSL*) noexcept nogil
        int (*SSL_do_handshake)(SSL*) noexcept nogil
        int (*SSL_read)(SSL*, void*, int) noexcept nogil
        int (*SSL_peek)(SSL*, void*, int) noexcept nogil
        int (*SSL_write)(SSL*, const void*, int) noexcept nogil
        int (*SSL_shutdown)(SSL*) noexcept nogil
        int (*SSL_get_error)(const SSL*, int) noexcept nogil
        int (*SSL_has_pending)(const SSL*) noexcept nogil
        long (*SSL_get_verify_result)(const SSL*) noexcept nogil
        const char* (*SSL_get_version)(const SSL*) noexcept nogil
        X509* (*SSL_get1_peer_certificate)(const SSL*) noexcept nogil
        unsigned long (*ERR_peek_last_error)() noexcept nogil
        void (*ERR_clear_error)() noexcept nogil
        const char* (*ERR_reason_error_string)(unsigned long) noexcept nogil
        const char* (*X509_verify_cert_error_string)(long) noexcept nogil
        BIO_METHOD* (*BIO_meth_new)(int, const char*) noexcept nogil
        int (*BIO_meth_set_read)(
            BIO_METHOD*, int (*)(BIO*, char*, int) noexcept nogil) noexcept nogil
        int (*BIO_meth_set_write)(
            BIO_METHOD*, int (*)(BIO*, const char*, int) noexcept nogil) noexcept nogil
        int (*BIO_meth_set_ctrl)(
            BIO_METHOD*, long (*)(BIO*, int, long, void*) noexcept nogil) noexcept nogil
        BIO* (*BIO_new)(const BIO_METHOD*) noexcept nogil
        BIO* (*BIO_new_file)(const char*, const char*) noexcept nogil
        int (*BIO_free)(BIO*) noexcept nogil
        void (*BIO_set_data)(BIO*, void*) noexcept nogil
        void* (*BIO_get_data)(BIO*) noexcept nogil
        void (*BIO_set_init)(BIO*, int) noexcept nogil
        void (*BIO_set_flags)(BIO*, int) noexcept nogil
        void (*BIO_clear_flags)(BIO*, int) noexcept nogil
        X509* (*PEM_read_bio_X509)(BIO*, X509**, void*, void*) noexcept nogil
        X509_CRL* (*PEM_read_bio_X509_CRL)(BIO*, X509_CRL**, void*, void*) noexcept nogil
        int (*X509_STORE_add_crl)(X509_STORE*, X509_CRL*) noexcept nogil
        int (*X509_VERIFY_PARAM_set_flags)(X509_VERIFY_PARAM*, unsigned long) noexcept nogil
        void (*X509_VERIFY_PARAM_set_hostflags)(X509_VERIFY_PARAM*, unsigned int) noexcept nogil
        int (*X509_VERIFY_PARAM_set1_host)(X509_VERIFY_PARAM*, const char*, size_t) noexcept nogil
        int (*X509_VERIFY_PARAM_set1_ip_asc)(X509_VERIFY_PARAM*, const char*) noexcept nogil
        void (*X509_free)(X509*) noexcept nogil
        void (*X509_CRL_free)(X509_CRL*) noexcept nogil
        long (*X509_get_version)(const X509*) noexcept nogil
        const ASN1_STRING* (*X509_get0_serialNumber)(const X509*) noexcept nogil
        const ASN1_TIME* (*X509_get0_notBefore)(const X509*) noexcept nogil
        const ASN1_TIME* (*X509_get0_notAfter)(const X509*) noexcept nogil
        X509_NAME* (*X509_get_subject_name)(const X509*) noexcept nogil
        X509_NAME* (*X509_get_issuer_name)(const X509*) noexcept nogil
        void* (*X509_get_ext_d2i)(const X509*, int, int*, int*) noexcept nogil
        int (*X509_NAME_entry_count)(const X509_NAME*) noexcept nogil
        X509_NAME_ENTRY* (*X509_NAME_get_entry)(const X509_NAME*, int) noexcept nogil
        ASN1_OBJECT* (*X509_NAME_ENTRY_get_object)(const X509_NAME_ENTRY*) noexcept nogil
        ASN1_STRING* (*X509_NAME_ENTRY_get_data)(const X509_NAME_ENTRY*) noexcept nogil
        int (*X509_NAME_ENTRY_set)(const X509_NAME_ENTRY*) noexcept nogil
        int (*OBJ_obj2txt)(char*, int, const ASN1_OBJECT*, int) noexcept nogil
        int (*ASN1_STRING_to_UTF8)(unsigned char**, const ASN1_STRING*) noexcept nogil
        const unsigned char* (*ASN1_STRING_get0_data)(const ASN1_STRING*) noexcept nogil
        int (*ASN1_STRING_length)(const ASN1_STRING*) noexcept nogil
        int (*ASN1_STRING_type)(const ASN1_STRING*) noexcept nogil
        int (*ASN1_TIME_to_tm)(const ASN1_TIME*, tm*) noexcept nogil
        int (*OPENSSL_sk_num)(const OPENSSL_STACK*) noexcept nogil
        void* (*OPENSSL_sk_value)(const OPENSSL_STACK*, int) noexcept nogil
        void (*OPENSSL_sk_pop_free)(OPENSSL_STACK*, void (*)(void*) noexcept nogil) noexcept nogil
        void* (*GENERAL_NAME_get0_value)(const GENERAL_NAME*, int*) noexcept nogil
        void (*GENERAL_NAME_free)(GENERAL_NAME*) noexcept nogil
        void (*CRYPTO_free)(void*, const char*, int) noexcept nogil

    const char* libssl_load(libssl_t*)

    enum:
        SSL_CTRL_MODE
        SSL_CTRL_SET_READ_AHEAD
        SSL_CTRL_SET_SESS_CACHE_MODE
        SSL_CTRL_SET_TLSEXT_HOSTNAME
        SSL_CTRL_SET_MIN_PROTO_VERSION
        TLSEXT_NAMETYPE_host_name
        TLS1_2_VERSION
        TLS1_3_VERSION
        SSL_MODE_ENABLE_PARTIAL_WRITE
        SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER
        SSL_MODE_RELEASE_BUFFERS
        SSL_SESS_CACHE_OFF
        SSL_VERIFY_NONE
        SSL_VERIFY_PEER
        SSL_VERIFY_FAIL_IF_NO_PEER_CERT
        SSL_OP_NO_TICKET
        SSL_OP_NO_COMPRESSION
        SSL_OP_NO_RENEGOTIATION
        SSL_FILETYPE_PEM
        SSL_ERROR_WANT_READ
        SSL_ERROR_WANT_WRITE
        SSL_ERROR_SYSCALL
        SSL_ERROR_ZERO_RETURN
        BIO_TYPE_SOURCE_SINK
        BIO_FLAGS_READ
        BIO_FLAGS_WRITE
        BIO_FLAGS_IO_SPECIAL
        BIO_FLAGS_SHOULD_RETRY
        BIO_CTRL_FLUSH
        X509_V_OK
        X509_V_ERR_HOSTNAME_MISMATCH
        X509_V_ERR_IP_ADDRESS_MISMATCH
        X509_V_FLAG_CRL_CHECK
        X509_V_FLAG_PARTIAL_CHAIN
        X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS
        X509_CHECK_FLAG_NEVER_CHECK_SUBJECT
        ERR_LIB_PEM
        PEM_R_NO_START_LINE
        V_ASN1_NEG
        NID_subject_alt_name
        GEN_EMAIL
        GEN_DNS
        GEN_DIRNAME
        GEN_URI
        GEN_IPADD
        GEN_RID
