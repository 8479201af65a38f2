"""A resolver of the tests' own, in the place of ``socket.getaddrinfo``."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from tests.support import LONG_TIMEOUT

__all__ = ["Names"]


class Names:
    """What names stand for. Others, and addresses, are the real resolver's.

    Attributes
    ----------
    of : dict
        By name: a list of (IPv4 address, port), or an exception, which is raised anew.
    gates : dict
        By name: an Event that its answer waits for.
    asked : list of (str, str)
        Name and thread of each question.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: dict[str, list[tuple[str, int]] | Exception] = {}
        self.gates: dict[str, threading.Event] = {}
        self.asked: list[tuple[str, str]] = []
        self._real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._getaddrinfo)

    def hang(self, *names: str) -> threading.Event:
        """Have the look-up of each name wait for an event, and fail then."""
        gate = threading.Event()
        for name in names:
            self.gates[name] = gate
            self.of[name] = socket.gaierror(
                socket.EAI_AGAIN, "Temporary failure in name resolution"
            )
        return gate

    def _getaddrinfo(self, host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
        self.asked.append((host, threading.current_thread().name))
        if host in self.gates:
            self.gates[host].wait(LONG_TIMEOUT)
        found = self.of.get(host)
        if found is None:
            return self._real(host, port, *args, **kwargs)
        if isinstance(found, Exception):
            raise type(found)(*found.args)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in found]
