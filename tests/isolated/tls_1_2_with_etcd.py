"""Speak with an etcd both ways, as a process whose OpenSSL goes no further than TLS 1.2."""

from __future__ import annotations

import ssl
import sys
from pathlib import Path

from pipeline.tls.credentials import Credentials
from tests.interop.test_etcd_tls import exchange
from tests.support.etcd import Cluster
from tests.support.listening import dial
from tests.support.tls import Authority, Pair, shake

directory = Path(sys.argv[1])
authority = Authority(directory / "certs")


def as_server(url: str) -> str | None:
    """Connect to our listener with all that OpenSSL can, whatever its configuration says."""
    context = authority.client(*authority.issue("caller"))
    context.maximum_version = ssl.TLSVersion.MAXIMUM_SUPPORTED
    with dial(url) as sock, context.wrap_socket(sock, server_hostname="127.0.0.1") as tls:
        return tls.version()


def as_client() -> str | None:
    """Shake hands, as our Transport does, with a server that can do all."""
    context = Credentials(authority.info("ours")).client_context
    with Pair() as pair:
        ours = context.session(pair.ours.fileno(), "127.0.0.1")
        theirs = pair.python(authority.server(), server_side=True)
        shake(ours, theirs)
        return theirs.version()


cluster = Cluster(directory, authority=authority)
try:
    cluster.start()
    exchange(cluster)
    print(f"as a server {as_server(cluster.our_url)}, as a client {as_client()}")
finally:
    cluster.stop()
