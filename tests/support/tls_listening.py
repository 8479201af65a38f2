"""An https listener, and callers of it."""

from __future__ import annotations

import contextlib
import socket
import ssl
from pathlib import Path
from typing import Any

from pipeline import ReceiverConfig
from pipeline.receive.listener import Listener
from pipeline.tls.credentials import Credentials
from tests.support.http import handlers_of
from tests.support.listening import dial
from tests.support.raft import FakeRaft
from tests.support.tls import Authority

__all__ = ["ANY", "Node"]

ANY = "https://127.0.0.1:0"


class Node:
    """A listener with a certificate, and callers with others of the same authority."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority(directory)
        self.files = self.authority.issue("node")
        self.raft = FakeRaft()
        self._stack = contextlib.ExitStack()

    def listen(self, config: ReceiverConfig | None = None, **settings: Any) -> Listener:
        """Listen until the test ends; settings are TLSInfo's."""
        info = self.authority.info(**settings)
        self.config = config or ReceiverConfig()
        self.credentials = Credentials(info)
        self.handlers = handlers_of(
            self.raft,
            self.config,
            allow_member=info.allow_member,
        )
        self.listener = self._stack.enter_context(
            Listener(self.handlers, ANY, self.config, self.credentials)
        )
        return self.listener

    def dial(self) -> socket.socket:
        """Connect without TLS."""
        return self._stack.enter_context(dial(self.listener.url))

    def call(self, *files: Path, version: str = "1.3") -> ssl.SSLSocket:
        """Connect as a member, with a certificate of one's own or the node's."""
        return self.shake(self.authority.client(*(files or self.files), version=version))

    def shake(
        self, context: ssl.SSLContext, session: ssl.SSLSession | None = None
    ) -> ssl.SSLSocket:
        # Truncation is an error here, so that a close_notify is seen.
        return self._stack.enter_context(
            context.wrap_socket(
                self.dial(),
                server_hostname="127.0.0.1",
                suppress_ragged_eofs=False,
                session=session,
            )
        )

    def close(self) -> None:
        self._stack.close()
