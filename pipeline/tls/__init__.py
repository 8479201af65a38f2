"""TLS: what a node's certificate, key and trust are, and how they are replaced while it runs.

``TLSInfo`` is what an application gives; the rest is the library's.
"""

from pipeline.tls.credentials import HANDSHAKE_TIMEOUT_S, Credentials
from pipeline.tls.info import TLSInfo
from pipeline.tls.rules import not_after, read_certificate

__all__ = ["HANDSHAKE_TIMEOUT_S", "Credentials", "TLSInfo", "not_after", "read_certificate"]
