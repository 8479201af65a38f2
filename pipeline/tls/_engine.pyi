"""The typed face of ``_engine.pyx``; checked by stubtest."""

from collections.abc import Mapping
from typing import Any, Self, final

from typing_extensions import Buffer

from pipeline.config import AnyPath

__all__ = ["Context", "Session", "TLSError"]

class TLSError(OSError): ...

@final
class Session:
    @property
    def is_established(self) -> bool: ...
    @property
    def has_heard(self) -> bool: ...
    @property
    def has_ended(self) -> bool: ...
    @property
    def wants_to_write(self) -> bool: ...
    @property
    def version(self) -> str: ...
    @property
    def certificate(self) -> Mapping[str, Any] | None: ...
    @property
    def reason(self) -> str: ...
    def shake(self) -> bool: ...
    def recv_into(self, buffer: Buffer) -> int: ...
    def send(self, data: Buffer) -> int: ...
    def is_silent(self) -> bool: ...
    def end(self) -> bool: ...

@final
class Context:
    not_after: float
    is_server: bool
    def __new__(
        cls,
        *,
        is_server: bool,
        cert_file: AnyPath,
        key_file: AnyPath,
        trusted_ca_file: AnyPath | None,
        crl_file: AnyPath | None,
        min_version: str,
        asks_for_certificate: bool,
    ) -> Self: ...
    def session(self, fd: int, name: str | None = ...) -> Session: ...
