"""TLS: what a node's certificate, key and trust are, and how they are replaced while it runs.

``TLSInfo`` is what an application gives. The rest is the library's: the files that are in force
(``credentials.py``), the rules for names, and the engine.
"""

from pipeline.tls.info import TLSInfo

__all__ = ["TLSInfo"]
