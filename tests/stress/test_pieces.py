"""Requests over TLS, cut anywhere and sent ahead: none is left lying, wherever it waits.

OpenSSL reads ahead, and the kernel tells once of what has come: what is overlooked in either is
found when the time for it is over. So times are short here, and none may be.
"""

from __future__ import annotations

import contextlib
import random
import ssl
import threading
from pathlib import Path

import pytest

from pipeline import Entry, Message, MessageType, ReceiverConfig
from pipeline.tls.credentials import Credentials
from tests.support import LONG_TIMEOUT
from tests.support.http import HEARTBEAT, peer_headers
from tests.support.listening import GOOD, dial, listen, post, raw_head
from tests.support.raft import FakeRaft
from tests.support.tls import Authority

CALLERS = 4
CONNECTIONS = 40


def message_of(size: int) -> bytes:
    entries = [Entry(data=bytes(size))]
    return post(Message(type=MessageType.APP, from_=1, entries=entries).marshal())


REQUESTS = [
    *[GOOD] * 4,
    raw_head(line="GET /raft/probing HTTP/1.1"),
    post(HEARTBEAT.marshal(), is_chunked=True),
    raw_head("content-length: 50", headers=peer_headers(x_etcd_cluster_id="1")) + bytes(50),
    *[message_of(size) for size in (100, 5000, 70_000, 300_000, 1_500_000)],
]


class Caller:
    """A connection whose bytes are cut anywhere, on either side of TLS."""

    def __init__(self, url: str, context: ssl.SSLContext, chance: random.Random) -> None:
        self._chance = chance
        self._sock = dial(url)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="127.0.0.1")
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.push()
                self._incoming.write(self._sock.recv(65536))
        if chance.random() < 0.3:
            self.push()  # else what ends the handshake goes with the first request

    def push(self) -> None:
        """Send what TLS has made, in pieces."""
        data = self._outgoing.read()
        sizes = [1000, 20_000, 1 << 20]
        if len(data) < 3000 and self._chance.random() < 0.5:
            sizes = [1, 2, 5, 30]
        while data:
            n = self._chance.choice(sizes)
            self._sock.sendall(data[:n])
            data = data[n:]

    def send(self, data: bytes) -> None:
        """Make records of any size."""
        sizes = [1, 3, 50, 1000] if len(data) < 4000 else [1000, 16_384, 100_000]
        while data:
            n = self._chance.choice(sizes)
            self._tls.write(data[:n])
            data = data[n:]
            if self._chance.random() < 0.3:
                self.push()
        self.push()

    def read_answers(self, count: int) -> None:
        """Read so many answers, each of which ends in a line."""
        received = b""
        while received.count(b"HTTP/1.1 ") < count or not received.endswith(b"\n"):
            try:
                received += self._tls.read(65536)
            except ssl.SSLWantReadError:
                came = self._sock.recv(65536)
                assert came, received[-500:]
                self._incoming.write(came)

    def close(self) -> None:
        if self._chance.random() < 0.5:
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            self.push()
        self._sock.close()


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_requests_cut_anywhere_are_all_answered(tmp_path: Path, version: str) -> None:
    authority = Authority(tmp_path)
    context = authority.client(*authority.issue("caller"), version=version)
    config = ReceiverConfig(
        head_timeout_s=LONG_TIMEOUT / 4, stall_timeout_s=LONG_TIMEOUT / 4, handlers=3
    )
    credentials = Credentials(authority.info())
    sent: list[int] = []

    def call(number: int) -> None:
        chance = random.Random(number)
        for _ in range(CONNECTIONS):
            caller = Caller(listener.url, context, chance)
            for _ in range(chance.randint(1, 6)):
                requests = chance.choices(REQUESTS, k=chance.randint(1, 6))
                caller.send(b"".join(requests))
                caller.read_answers(len(requests))
                sent.append(len(requests))
            caller.close()

    with listen(FakeRaft(), "https://127.0.0.1:0", config, credentials) as listener:
        callers = [threading.Thread(target=call, args=(number,)) for number in range(CALLERS)]
        for thread in callers:
            thread.start()
        for thread in callers:
            thread.join()
        stats = listener.stats()
    assert stats.handshakes == stats.accepted == CALLERS * CONNECTIONS
    assert (stats.head_timeouts, stats.body_timeouts, stats.idle_timeouts) == (0, 0, 0)
    assert len(sent) > CALLERS * CONNECTIONS
