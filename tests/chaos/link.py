"""The way from one member to another: a TCP proxy that does to connections what networks do."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import struct
import threading
from collections.abc import Iterator
from types import TracebackType

from pipeline.examples.etcd import free_port

#: Closing sends a reset.
_RESET = struct.pack("ii", 1, 0)


class Fault(enum.Enum):
    """What is wrong with a link."""

    NONE = "none"
    #: Connections are reset, and new ones refused.
    CUT = "cut"
    #: Connections stand and new ones are accepted; nothing moves on any.
    HOLE = "hole"
    #: What is sent arrives; what is answered does not.
    MUTE = "mute"


class Link:
    """One way: listens on ``port`` of 127.0.0.1 and connects to ``target`` there.

    Its methods run on the loop of its :class:`Network`.
    """

    def __init__(self, name: str, port: int, target: int) -> None:
        self.name = name
        self.port = port
        self.target = target
        self.fault = Fault.NONE
        self.accepted = 0  # connections
        self._server: asyncio.Server | None = None
        self._changed = asyncio.Event()  # set and replaced when the fault changes
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def change(self, fault: Fault) -> None:
        """Have this fault from now on; with NONE, what has waited goes on."""
        self.fault = fault
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        if fault is Fault.CUT:
            await self.close()
        elif self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def close(self) -> None:
        """Refuse new connections and reset the others."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._writers:
            _reset(writer)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        onward: asyncio.StreamWriter | None = None
        try:
            await self._wait_while(Fault.HOLE)
            back, onward = await asyncio.open_connection("127.0.0.1", self.target)
            self._writers.add(onward)
            there = asyncio.create_task(self._pump(reader, onward, {Fault.HOLE}))
            again = asyncio.create_task(self._pump(back, writer, {Fault.HOLE, Fault.MUTE}))
            try:
                await asyncio.wait({there, again}, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                there.cancel()
                again.cancel()
                await asyncio.gather(there, again, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            # Nobody listens there, or the link is cut. The task ends in good order, for asyncio
            # would print a traceback of one that was cancelled.
            pass
        finally:
            for end in (writer, onward):
                if end is not None:
                    self._writers.discard(end)
                    _reset(end)
            self._tasks.discard(task)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, faults: set[Fault]
    ) -> None:
        """Carry one direction; its end, too, waits while a fault holds it up."""
        while data := await reader.read(65536):
            await self._wait_while(*faults)
            writer.write(data)
            await writer.drain()
        await self._wait_while(*faults)
        writer.write_eof()

    async def _wait_while(self, *faults: Fault) -> None:
        while self.fault in faults:
            await self._changed.wait()


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


class Network:
    """Links, on a thread of their own. A context manager."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos-network")

    def __enter__(self) -> Network:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for link in self.links:
            self._run(link.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def link(self, name: str, target: int) -> Link:
        """Make a link to a port of 127.0.0.1; it listens from now on."""

        async def make() -> Link:
            link = Link(name, free_port(), target)
            await link.change(Fault.NONE)
            return link

        made = asyncio.run_coroutine_threadsafe(make(), self._loop).result()
        self.links.append(made)
        return made

    def change(self, link: Link, fault: Fault) -> None:
        """Have a fault on a link."""
        self._run(link.change(fault))

    def _run(self, coroutine: object) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()  # type: ignore[arg-type]


@contextlib.contextmanager
def faults(network: Network, links: list[Link], fault: Fault) -> Iterator[None]:
    """Have a fault on some links for as long as the block runs."""
    try:
        for link in links:
            network.change(link, fault)
        yield
    finally:
        for link in links:
            network.change(link, Fault.NONE)
