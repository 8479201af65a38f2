"""ScriptedServer: a peer that answers byte by byte what the test says, or not at all."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tests.support import LONG_TIMEOUT

OK = b"HTTP/1.1 204 No Content\r\nX-Etcd-Cluster-Id: 1\r\n\r\n"
ERROR = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"


def answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    """Return an answer with a Content-Length: ``answer("412 Precondition Failed", b"...")``."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


PROBED = answer("200 OK", b'{"OK":true,"Now":"2026-01-01T00:00:00.5Z"}')


@dataclass(frozen=True)
class Request:
    """One whole request."""

    head: bytes  # up to and with the blank line
    body: bytes
    connection: int  # number of the connection it came on, from 0

    @property
    def line(self) -> str:
        return self.head.split(b"\r\n", 1)[0].decode()

    @property
    def headers(self) -> dict[str, str]:
        """The headers, names as they came."""
        lines = self.head.decode().split("\r\n")[1:-2]
        return {name: value for name, _, value in (line.partition(": ") for line in lines)}


class Connection:
    """The server's end of one connection, in the hands of a script."""

    def __init__(self, server: ScriptedServer, sock: socket.socket, number: int) -> None:
        self.server = server
        self.sock = sock
        self.number = number
        self.requests = 0  # read whole
        self._lock = threading.Lock()  # nobody ends what has another connection's descriptor by now
        self.is_reset = False

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def end(self) -> None:
        """End the connection in order: everything sent arrives, then the end of the stream.

        In any thread. What the connection's own one waits for ends, and it closes the socket.
        """
        with self._lock, contextlib.suppress(OSError):
            if not self.is_reset:
                self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection in order, and close the socket. In the connection's own thread."""
        self.end()
        with self._lock:
            self.sock.close()

    def reset(self) -> None:
        """End the connection with RST, which is sent when its own thread closes it. Any thread."""
        with self._lock:
            self.is_reset = True
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # Ends a recv in the connection's own thread. Sends nothing.
            self.sock.shutdown(socket.SHUT_RD)

    def read_head(self) -> bytes:
        """Read up to and with the blank line; b"" when the peer ends the stream before."""
        head = bytearray()
        while not head.endswith(b"\r\n\r\n"):
            # Byte by byte would be slow; what is peeked at beyond the head stays where it is.
            seen = self.sock.recv(65536, socket.MSG_PEEK)
            if not seen:
                return b""
            end = (head + seen).find(b"\r\n\r\n")
            take = len(seen) if end < 0 else end + 4 - len(head)
            head += self.sock.recv(take)
        return bytes(head)

    def read_body(self, size: int) -> bytes:
        """Read exactly ``size`` bytes, or fewer when the peer ends the stream before."""
        body = bytearray(size)
        view = memoryview(body)
        got = 0
        while got < size:
            n = self.sock.recv_into(view[got:])
            if n == 0:
                break
            got += n
        view.release()
        return bytes(body[:got])


def _close_half_made(error: OSError) -> None:
    """Close the socket that wrap_socket was making when it saw that the peer has gone.

    CPython (3.11) does not. Here and not where it is caught: that frame would hold those it holds.
    """
    trace = error.__traceback__
    for frame, _ in traceback.walk_tb(trace and trace.tb_next):
        half_made = frame.f_locals.get("self")
        if isinstance(half_made, ssl.SSLSocket):
            half_made.close()


class TLSConnection(Connection):
    """The same, over TLS. Made by the connection's own thread: it waits for the handshake."""

    sock: ssl.SSLSocket

    def __init__(
        self, server: ScriptedServer, sock: socket.socket, number: int, context: ssl.SSLContext
    ) -> None:
        super().__init__(server, sock, number)
        self._context = context

    def shake(self) -> None:
        try:
            self.sock = self._context.wrap_socket(self.sock, server_side=True)
        except OSError as error:
            _close_half_made(error)
            raise

    def read_head(self) -> bytes:
        head = bytearray()
        while not head.endswith(b"\r\n\r\n"):  # TLS cannot be peeked into
            byte = self.sock.recv(1)
            if not byte:
                return b""
            head += byte
        return bytes(head)


#: What to do with a whole request: bytes are written, None says the script has seen to it.
Script = Callable[[Connection, Request], bytes | None]


def always(data: bytes) -> Script:
    return lambda connection, request: data


def in_turn(*steps: bytes | Script) -> Script:
    """One step per request the server gets, on whatever connection; the last one repeats."""
    rest = list(steps)
    lock = threading.Lock()

    def script(connection: Connection, request: Request) -> bytes | None:
        with lock:
            step = rest.pop(0) if len(rest) > 1 else rest[0]
        return step if isinstance(step, bytes) else step(connection, request)

    return script


def close(connection: Connection, request: Request) -> None:
    connection.close()


def reset(connection: Connection, request: Request) -> None:
    connection.reset()


def then_close(data: bytes) -> Script:
    """Write ``data`` and end the connection."""

    def script(connection: Connection, request: Request) -> None:
        connection.send(data)
        connection.close()

    return script


def once_idle(act: Callable[[Connection], object]) -> Script:
    """Answer 204 and ``act`` once ``server.is_idle`` is released, before anything else is read.

    In the connection's own thread: of a TLS connection no other may read or write.
    """

    def script(connection: Connection, request: Request) -> None:
        connection.send(OK)
        connection.server.is_idle.acquire(timeout=LONG_TIMEOUT)
        act(connection)

    return script


class ScriptedServer:
    """A TCP server on loopback that records whole requests and answers by a script.

    Parameters
    ----------
    script : Script, optional
        Called in the connection's own thread for every whole request; by default answers 204.
    on_connect : callable, optional
        Called with a new connection before anything is read.
    on_head : callable, optional
        Called with the connection and a head before its body is read; False ends the serving of
        this connection (the script has seen to it).
    host : str
    tls : ssl.SSLContext, optional
        Of a server that speaks TLS. Its handshake comes before ``on_connect``.

    Notes
    -----
    ``hold`` is a script that keeps a request unanswered until ``release`` is set; ``once_idle``
    waits for ``is_idle``. After ``stop``, which the ``with`` statement calls, there is no thread
    and no connection. Probes are answered by ``on_probe`` and recorded apart.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        on_connect: Callable[[Connection], None] | None = None,
        on_head: Callable[[Connection, bytes], bool] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.tls = tls
        self.script: Script = script or always(OK)
        self.on_connect = on_connect
        self.on_head = on_head
        self.on_probe: Script = always(PROBED)
        self.release = threading.Event()
        self.is_idle = threading.Semaphore(0)
        self._changed = threading.Condition()  # guards what follows
        self.requests: list[Request] = []
        self.probes: list[Request] = []
        self.connections: list[Connection] = []
        self.ended = 0  # connections that are served no more
        self._is_stopped = False
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, name="server-accept", daemon=True)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def hold(self, connection: Connection, request: Request) -> bytes | None:
        """A script: answer 204 once ``release`` is set."""
        self.release.wait(LONG_TIMEOUT)
        return OK

    def wait_requests(self, count: int, timeout: float = LONG_TIMEOUT) -> list[Request]:
        """Wait until ``count`` requests have come whole; return all of them."""
        self.wait_for(lambda: len(self.requests) >= count, timeout)
        return list(self.requests)

    def wait_connections(self, count: int, timeout: float = LONG_TIMEOUT) -> list[Connection]:
        """Wait until ``count`` connections were accepted; return all of them."""
        self.wait_for(lambda: len(self.connections) >= count, timeout)
        return list(self.connections)

    def wait_for(self, predicate: Callable[[], bool], timeout: float = LONG_TIMEOUT) -> None:
        """Wait until ``predicate`` holds; it is looked at after every change."""
        with self._changed:
            if not self._changed.wait_for(predicate, timeout):
                raise AssertionError(
                    f"did not happen within {timeout:g} s: {len(self.requests)} requests "
                    f"on {len(self.connections)} connections, {self.ended} of them ended"
                )

    def stop(self) -> None:
        """End all connections and threads."""
        with self._changed:
            if self._is_stopped:
                return
            self._is_stopped = True
            connections = list(self.connections)
        self.release.set()
        self.is_idle.release(len(connections) or 1)
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(LONG_TIMEOUT)
        self._listener.close()
        for connection in connections:
            connection.end()
        for thread in self._threads:
            thread.join(LONG_TIMEOUT)
            assert not thread.is_alive(), f"{thread.name} does not end"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._changed:
                number = len(self.connections)
                connection = (
                    TLSConnection(self, sock, number, self.tls)
                    if self.tls
                    else Connection(self, sock, number)
                )
                self.connections.append(connection)
                if self._is_stopped:
                    connection.close()
                self._changed.notify_all()
            thread = threading.Thread(
                target=self._serve, args=(connection,), name="server-serve", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:
                # From 3.12 on a program that ends lets no thread begin any more.
                if "interpreter shutdown" not in str(error):
                    raise
                return
            self._threads.append(thread)

    def _serve(self, connection: Connection) -> None:
        # The client going away, and the script closing the connection, end it.
        with contextlib.suppress(OSError):
            if isinstance(connection, TLSConnection):
                connection.shake()
            if self.on_connect is not None:
                self.on_connect(connection)
            while not connection.is_reset and self._serve_one(connection):
                pass
        connection.close()
        with self._changed:
            self.ended += 1
            self._changed.notify_all()

    def _serve_one(self, connection: Connection) -> bool:
        head = connection.read_head()
        if not head:
            return False
        if head.startswith(b"GET /raft/probing "):  # not what a script is about
            request = Request(head, b"", connection.number)
            with self._changed:
                self.probes.append(request)
                self._changed.notify_all()
            data = self.on_probe(connection, request)
            if data is not None:
                connection.send(data)
            return True
        if self.on_head is not None and not self.on_head(connection, head):
            return False
        size = next(
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        )
        body = connection.read_body(size)
        if len(body) < size:
            return False
        connection.requests += 1
        script = self.script  # what a test sets once it knows of this request is for the next one
        request = Request(head, body, connection.number)
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
        data = script(connection, request)
        if data is not None:
            connection.send(data)
        return True


@contextlib.contextmanager
def refused_port() -> Iterator[int]:
    """A port of 127.0.0.1 that refuses connections: bound, and nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """A port of 127.0.0.1 where a connect gets no answer: its backlog is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port: int = listener.getsockname()[1]
        for _ in range(3):  # one more than the backlog holds
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.bind(("127.0.0.2", 0))  # so that dials_to does not count it
            sock.connect_ex(("127.0.0.1", port))
        yield port
