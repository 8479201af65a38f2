"""What failures leave for the cyclic garbage collector, which a program may have switched off.

``cycles.py DIRECTORY`` fails each kind of thing many times with the collector off, and then counts
what it alone can free. Prints "ok", or for each kind what is left, and of which types.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import http.client
import logging
import socket
import ssl
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline import (
    EncodedMessage,
    MarshalError,
    Message,
    MessageType,
    PipelineConfig,
    PipelineError,
    ReceiverConfig,
    Transport,
    TransportConfig,
    UsageError,
    aio,
)
from tests.support.http import CLUSTER_ID, peer_headers
from tests.support.listening import dial
from tests.support.raft import FakeRaft
from tests.support.senders import message
from tests.support.server import ERROR, ScriptedServer, always, refused_port, then_close
from tests.support.tls import Authority
from tests.support.waiting import eventually

#: Often enough to tell what each leaves from what there is once.
N = 20

directory = Path(sys.argv[1])
authority = Authority(directory / "ours")
stranger = Authority(directory / "another")
logging.getLogger("pipeline").addHandler(logging.NullHandler())
logging.getLogger("pipeline").propagate = False
logging.getLogger("asyncio").propagate = False
real_getaddrinfo = socket.getaddrinfo


def getaddrinfo(host: str, *args: Any, **kwargs: Any) -> Any:
    if host == "gone.test":
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return real_getaddrinfo(host, *args, **kwargs)


socket.getaddrinfo = getaddrinfo
found: list[str] = []


WARM_UP = 5


@contextlib.contextmanager
def counted(what: str) -> Iterator[None]:
    """Note what N failures leave. A thread may still hold what the last one left: that is one."""
    gc.collect()
    gc.disable()
    yield
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    kinds = collections.Counter(type(thing).__name__ for thing in gc.garbage)
    gc.garbage.clear()
    gc.enable()
    gc.collect()
    if kinds.total() > N / 2:
        found.append(f"{what}: {kinds.total() / N:.1f} each: {dict(kinds.most_common(8))}")


def left_by(what: str, fail: Callable[[], object]) -> None:
    """Count what is left by N failures; ``fail`` returns when one is over."""
    for _ in range(WARM_UP):
        fail()
    time.sleep(0.02)  # for threads to let go of what they have in their hands
    with counted(what):
        for _ in range(N):
            fail()


class Raising(FakeRaft):
    def __init__(self) -> None:
        super().__init__()
        self.process_error = RuntimeError("the node's")

    def process(self, message: Message) -> None:
        raise RuntimeError("the node's")

    def report_unreachable(self, member_id: int) -> None:
        raise RuntimeError("the node's")

    report_snapshot = report_unreachable  # type: ignore[assignment]


# -- sending


def sending(raft: FakeRaft) -> Iterator[tuple[str, str]]:
    with refused_port() as port:
        yield "refused", f"http://127.0.0.1:{port}"
        yield "refused, TLS", f"https://127.0.0.1:{port}"
    yield "no such name", "http://gone.test:1"
    for name, script in {
        "500": always(ERROR),
        "malformed": then_close(b"HTTP/9.9 what\r\n\r\n"),
        "cut": then_close(b"HTTP/1.1 204"),
        "403": always(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"),
        "412": always(b"HTTP/1.1 412 x\r\nContent-Length: 20\r\n\r\nincompatible version"),
    }.items():
        for tls in (None, authority.server()):
            with ScriptedServer(script, tls=tls) as server:
                server.on_probe = script
                yield f"{name}{', TLS' if tls else ''}", server.url
    with ScriptedServer(tls=stranger.server()) as server:
        server.on_probe = always(ERROR)
        yield "a stranger's certificate", server.url
    with ScriptedServer() as server:
        server.on_connect = lambda connection: connection.send(b"HTTP/1.0 400 what\r\n\r\n")
        yield "no TLS there", server.url.replace("http:", "https:")


def messages() -> None:
    for raft, who in ((FakeRaft(), ""), (Raising(), ", the node raises")):
        config = TransportConfig(probe_interval_s=0)
        with Transport(1, 1, raft, tls=authority.info(), config=config) as transport:
            for peer, (name, url) in enumerate(sending(raft), 10):
                transport.add_peer(peer, [url])

                def fail(peer: int = peer) -> None:
                    transport.send([message(to=peer)])
                    eventually(lambda: is_idle(transport, peer))

                left_by(f"a message, {name}{who}", fail)

                def fail_snapshot(peer: int = peer) -> None:
                    snapshot = message(MessageType.SNAP, to=peer)
                    transfer = transport.send_snapshot(snapshot, b"database")
                    with contextlib.suppress(PipelineError):
                        transfer.result(20)

                left_by(f"a snapshot, {name}{who}", fail_snapshot)
                transport.remove_peer(peer)


def is_idle(transport: Transport, peer: int) -> bool:
    books = transport.stats()[peer]
    return books.queued + books.in_flight == 0


def probes() -> None:
    for name, url in sending(FakeRaft()):
        config = TransportConfig(probe_interval_s=0.001)
        with Transport(1, 1, FakeRaft(), tls=authority.info(), config=config) as transport:
            transport.add_peer(2, [url])

            def fail() -> None:
                before = transport.probe_stats()[2].lost
                eventually(lambda: transport.probe_stats()[2].lost > before)

            left_by(f"a probe, {name}", fail)


def sources() -> None:
    def raising() -> Iterator[bytes]:
        raise RuntimeError("the source's")
        yield b""

    with ScriptedServer() as server, Transport(1, 1, FakeRaft()) as transport:
        transport.add_peer(2, [server.url])
        for name, source in {"raises": raising, "is short": lambda: [b"x"]}.items():

            def fail(source: Callable[[], Any] = source) -> None:
                transfer = transport.send_snapshot(message(MessageType.SNAP), source(), size=9)
                with contextlib.suppress(PipelineError):
                    transfer.result(20)

            left_by(f"a source that {name}", fail)

        def cancel() -> None:
            transfer = transport.send_snapshot(message(MessageType.SNAP), b"database")
            transfer.cancel()
            with contextlib.suppress(PipelineError):
                transfer.result(20)

        left_by("a cancelled snapshot", cancel)

        def unknown() -> None:
            with contextlib.suppress(PipelineError):
                transport.send_snapshot(message(MessageType.SNAP, to=9), b"x").result(20)

        left_by("a snapshot for nobody", unknown)


# -- the caller's own


def calls() -> None:
    with Transport(1, 1, FakeRaft()) as transport:
        for name, call in {
            "send": lambda: transport.send([object()]),  # type: ignore[list-item]
            "add_peer": lambda: transport.add_peer(2, ["what"]),
            "listen": lambda: transport.listen("http://192.0.2.1:0"),
            "EncodedMessage": lambda: EncodedMessage(object(), type=3, to=2),  # type: ignore[arg-type]
            "Message": lambda: Message(type=3, term=-1),
            "unmarshal": lambda: Message.unmarshal(b"\xff" * 9),
        }.items():

            def fail(call: Callable[[], object] = call) -> None:
                with contextlib.suppress(UsageError, MarshalError, OSError, ValueError):
                    call()

            left_by(f"a call of {name}", fail)


# -- receiving


def ask(url: str, request: tuple[Any, ...], context: ssl.SSLContext | None = None) -> None:
    """Make a request: method, path, headers and body."""
    method, path, headers, body = request
    host = url.partition("://")[2]
    connection = (
        http.client.HTTPConnection(host, timeout=20)
        if context is None
        else http.client.HTTPSConnection(host, timeout=20, context=context)
    )
    connection.request(method, path, body, headers)
    connection.getresponse().read()
    connection.close()


BODY = message(to=2).marshal()
PATHS = ("/raft", "/raft/snapshot")


def requests() -> None:
    config = TransportConfig(
        receiver=ReceiverConfig(snapshot_dir=directory / "snapshots", handlers=2)
    )
    raft = Raising()
    with Transport(2, CLUSTER_ID, raft, tls=authority.info(), config=config) as transport:
        plain = transport.listen("http://127.0.0.1:0").url
        tls = transport.listen("https://127.0.0.1:0").url
        client = authority.client(*authority.issue("client"))
        for url, context in ((plain, None), (tls, client)):
            for name, (method, path, headers, body) in {
                "that the node raises for": ("POST", "/raft", peer_headers(), BODY),
                "with a body that is none": ("POST", "/raft", peer_headers(), b"\xff"),
                "of another cluster": ("POST", "/raft", peer_headers(x_etcd_cluster_id="9"), BODY),
                "for no path": ("GET", "/what", {}, b""),
                "that is no snapshot": ("POST", "/raft/snapshot", peer_headers(), b"x"),
            }.items():

                def fail(
                    url: str = url,
                    context: Any = context,
                    args: tuple[Any, ...] = (method, path, headers, body),
                ) -> None:
                    ask(url, args, context)

                left_by(f"a request {name} at {url[:5]}", fail)

        def strange() -> None:
            with dial(tls) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
                while sock.recv(4096):
                    pass

        left_by("a caller without TLS", strange)

        lines = "".join(f"{name}: {value}\r\n" for name, value in peer_headers().items())
        post, put = (f"POST {p} HTTP/1.1\r\nhost: x\r\n{lines}" for p in PATHS)
        chunked = "transfer-encoding: chunked\r\n\r\n"
        for name, data in {
            "without a host": "POST /raft HTTP/1.1\r\ncontent-length: 9\r\n\r\n",
            "that is cut": f"{post}content-length: 9\r\n\r\nx",
            "with chunks that are none": f"{post}{chunked}what\r\n",
            "with a chunk that is cut": f"{post}{chunked}9\r\nx",
            "with odd chunks": f"{post}{chunked}1;a=b\r\nx\r\nwhat\r\n",
            "refused, with no chunks": f"POST /what HTTP/1.1\r\nhost: x\r\n{chunked}what",
            "for a snapshot that is cut": f"{put}content-length: 99\r\n\r\nx",
            "for a snapshot with chunks that are none": f"{put}{chunked}what\r\n",
            "for a snapshot with odd chunks": f"{put}{chunked}1;a=b\r\nx\r\nwhat\r\n",
        }.items():

            def fail_raw(data: str = data) -> None:
                with dial(plain) as sock:
                    sock.sendall(data.encode())
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(4096):
                        pass

            left_by(f"a request {name}", fail_raw)


# -- asyncio


def asynchronous() -> None:
    class Node:
        async def process(self, message: Message) -> None:
            raise RuntimeError("the node's")

        def is_id_removed(self, member_id: int) -> bool:
            return False

        async def report_unreachable(self, member_id: int) -> None:
            raise RuntimeError("the node's")

        async def report_snapshot(self, member_id: int, status: int) -> None:
            raise RuntimeError("the node's")

    async def left_by_async(what: str, fail: Callable[[], Awaitable[object]]) -> None:
        """As ``left_by``, on the loop."""
        for _ in range(WARM_UP):
            await fail()
        await asyncio.sleep(0.02)
        with counted(what):
            for _ in range(N):
                await fail()

    async def main() -> None:
        config = TransportConfig(pipeline=PipelineConfig(), probe_interval_s=0)
        async with aio.Transport(2, CLUSTER_ID, Node(), config=config) as transport:
            url = (await transport.listen("http://127.0.0.1:0")).url
            with refused_port() as port:
                transport.add_peer(3, [f"http://127.0.0.1:{port}"])

                async def send() -> None:
                    transport.send([message(to=3)])
                    while (books := transport.stats()[3]).queued + books.in_flight:
                        await asyncio.sleep(0.001)

                async def send_snapshot() -> None:
                    with contextlib.suppress(PipelineError):
                        await transport.send_snapshot(message(MessageType.SNAP, to=3), b"x")

                async def listen() -> None:
                    with contextlib.suppress(OSError):
                        await transport.listen("http://192.0.2.1:0")

                async def post() -> None:
                    await asyncio.to_thread(ask, url, ("POST", "/raft", peer_headers(), BODY))

                await left_by_async("asyncio: a message", send)
                await left_by_async("asyncio: a snapshot", send_snapshot)
                await left_by_async("asyncio: a call that waits", listen)
                await left_by_async("asyncio: a process that raises", post)

    asyncio.run(main())


for part in (messages, probes, sources, calls, requests, asynchronous):
    part()
print("\n".join(found) or "ok", flush=True)
