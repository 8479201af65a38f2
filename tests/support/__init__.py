"""Fakes, servers and builders shared by the tests."""

from __future__ import annotations

import importlib.util
import socket

import pytest

from pipeline import TransportConfig

MIB = 1 << 20

# An event that is expected: long enough for a busy machine, reached only when a test fails.
LONG_TIMEOUT = 30.0

# An event that must not happen: how long a test watches for it.
SHORT_TIMEOUT = 0.05


# Most tests are about posts, and their nodes, also those of the processes they start, do nothing
# else. Those about streams say so, or are marked so.
DEFAULTS: dict[str, object] = getattr(TransportConfig.__init__, "__kwdefaults__")  # noqa: B009
assert DEFAULTS["streams"] is True
DEFAULTS["streams"] = False


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6 loopback")

has_trustme = pytest.mark.skipif(
    importlib.util.find_spec("trustme") is None, reason="trustme is not installed"
)
