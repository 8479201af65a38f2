"""TLS: what a node's certificate, key and trust are, and how they are replaced while it runs.

``TLSInfo`` is what an application gives; the rest is the library's.
"""

from pipeline.tls._engine import Context, Session, TLSError
from pipeline.tls.credentials import HANDSHAKE_TIMEOUT_S, Credentials
from pipeline.tls.info import TLSInfo

__all__ = ["HANDSHAKE_TIMEOUT_S", "Context", "Credentials", "Session", "TLSError", "TLSInfo"]
