"""The typed face of ``_engine.pyx``; checked by stubtest."""

from collections.abc import Mapping
from typing import Any, Self, final

from typing_extensions import Buffer

__all__ = ["Context", "Session", "TLSError"]

class TLSError(OSError): ...
