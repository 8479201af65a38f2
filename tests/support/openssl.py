"""A TLS client that does what Python's ssl cannot be told to: OpenSSL itself, by ctypes."""

from __future__ import annotations

import ctypes
import socket
from pathlib import Path
from typing import Any, Self

__all__ = ["RawClient"]

_FILETYPE_PEM = 1
_KEY_UPDATE_NOT_REQUESTED, _KEY_UPDATE_REQUESTED = 0, 1


def _library() -> Any:
    library = ctypes.CDLL("libssl.so.3")
    pointer, number = ctypes.c_void_p, ctypes.c_int
    text = ctypes.c_char_p
    for name, result, *arguments in (
        ("TLS_client_method", pointer),
        ("SSL_CTX_new", pointer, pointer),
        ("SSL_CTX_free", None, pointer),
        ("SSL_CTX_use_certificate_chain_file", number, pointer, text),
        ("SSL_CTX_use_PrivateKey_file", number, pointer, text, number),
        ("SSL_new", pointer, pointer),
        ("SSL_free", None, pointer),
        ("SSL_set_fd", number, pointer, number),
        ("SSL_connect", number, pointer),
        ("SSL_write", number, pointer, text, number),
        ("SSL_read", number, pointer, pointer, number),
        ("SSL_key_update", number, pointer, number),
        ("SSL_do_handshake", number, pointer),
        ("SSL_shutdown", number, pointer),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class RawClient:
    """A client's end of a connection that has shaken hands, over a socket that blocks.

    The server's certificate is not looked at.

    Parameters
    ----------
    sock : socket
        Connected; stays the caller's.
    cert, key : Path
        What the client shows.
    """

    def __init__(self, sock: socket.socket, cert: Path, key: Path) -> None:
        self._lib = lib = _library()
        sock.settimeout(None)
        self._context = lib.SSL_CTX_new(lib.TLS_client_method())
        assert lib.SSL_CTX_use_certificate_chain_file(self._context, bytes(cert)) == 1
        assert lib.SSL_CTX_use_PrivateKey_file(self._context, bytes(key), _FILETYPE_PEM) == 1
        self._ssl = lib.SSL_new(self._context)
        assert lib.SSL_set_fd(self._ssl, sock.fileno()) == 1
        assert lib.SSL_connect(self._ssl) == 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.SSL_free(self._ssl)
        self._lib.SSL_CTX_free(self._context)

    def send(self, data: bytes) -> None:
        """Write all of ``data``."""
        assert self._lib.SSL_write(self._ssl, data, len(data)) == len(data)

    def recv(self, size: int = 65536) -> bytes:
        """Read some bytes; none at the end, and after a failure."""
        buffer = ctypes.create_string_buffer(size)
        n = self._lib.SSL_read(self._ssl, buffer, size)
        return buffer.raw[: max(n, 0)]

    def update_key(self, *, asks: bool = False) -> None:
        """Change the key, and ask the other side to do so as well."""
        kind = _KEY_UPDATE_REQUESTED if asks else _KEY_UPDATE_NOT_REQUESTED
        assert self._lib.SSL_key_update(self._ssl, kind) == 1
        assert self._lib.SSL_do_handshake(self._ssl) == 1

    def say_goodbye(self) -> None:
        """Write a close_notify."""
        self._lib.SSL_shutdown(self._ssl)
