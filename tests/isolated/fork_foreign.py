"""fork() of a node: in the child every method of the parent's objects says whose they are.

As with a server that loads the application, forks and serves in its children. What ends things is
harmless there, a node of its own works, and the parent goes on. Prints "ok" or what went wrong.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline import (
    Inbox,
    Listener,
    MessageType,
    Pipeline,
    SnapshotTransfer,
    Transport,
    TransportConfig,
    UsageError,
    aio,
)
from pipeline.wire.answers import Request
from tests.support import LONG_TIMEOUT
from tests.support.http import peer_headers
from tests.support.raft import FakeRaft
from tests.support.senders import CLUSTER, message
from tests.support.server import ScriptedServer
from tests.support.tls import Authority
from tests.support.waiting import eventually

warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork in a process with threads


def uses(thing: object, kind: type, *harmless: str) -> dict[str, Callable[[], object]]:
    """Every use of the public methods and properties, with arguments that may be too many."""
    names = [name for name in dir(kind) if not name.startswith("_") and name not in harmless]
    names += [name for name in ("__enter__", "__aenter__") if hasattr(kind, name)]
    return {
        f"{kind.__name__}.{name}": lambda name=name: getattr(thing, name)()  # type: ignore[misc]
        for name in names
    }


def endless() -> Iterator[bytes]:
    yield b"x"
    over.wait(LONG_TIMEOUT)


async def started() -> aio.Transport:
    transport = aio.Transport(4, CLUSTER, FakeRaft())
    await transport.start()
    return transport


over = threading.Event()
authority = Authority(Path(sys.argv[1]))
server = ScriptedServer()
raft = FakeRaft()
config = TransportConfig(probe_interval_s=0.01)
transport = Transport(1, CLUSTER, raft, tls=authority.info(), config=config)
transport.start()
transport.add_peer(2, [server.url])
transport.add_remote(3, [server.url])
listener = transport.listen("https://127.0.0.1:0")
collector = transport.metrics_collector()
wsgi = transport.wsgi_app
pipeline = Pipeline(2, [server.url], FakeRaft(), member_id=1, cluster_id=CLUSTER)
pipeline.start()
loop = asyncio.new_event_loop()
awaited = loop.run_until_complete(started())
inbox, awaited_inbox = Inbox(), aio.Inbox()
taking = [Transport(n, CLUSTER, FakeRaft(), inbox=inbox) for n in (6, 7)]
taking[0].start()
awaited_taking = aio.Transport(8, CLUSTER, FakeRaft(), inbox=awaited_inbox)
loop.run_until_complete(awaited_taking.start())
transfer = transport.send_snapshot(message(MessageType.SNAP), b"x")
transfer.result(LONG_TIMEOUT)
running = transport.send_snapshot(message(MessageType.SNAP), endless(), size=10)
transport.send([message()])
eventually(lambda: transport.stats()[2].sent == 1)

child = os.fork()
if child == 0:
    problems = []
    own_methods = ("stop", "open", "post")  # of Sender: for the library's threads
    everything = {
        **uses(transport, Transport, "stop"),
        **uses(awaited, aio.Transport, "stop"),
        **uses(listener, Listener, "close", "is_closed"),
        **uses(inbox, Inbox, "disown_after_fork"),
        "len(Inbox)": lambda: len(inbox),
        "aio.Inbox.take": lambda: asyncio.run(awaited_inbox.take(timeout=0)),
        "aio.Inbox.closed": lambda: awaited_inbox.closed,
        **uses(
            running, SnapshotTransfer, "attach", "enter", "moved", "finish", "forget_after_fork"
        ),
        **{
            f"Pipeline.{n}": lambda n=n: getattr(pipeline, n)()
            for n in (  # type: ignore[misc]
                "start",
                "send",
                "stats",
                "follower_stats",
                "update",
                "__enter__",
            )
        },
    }
    for name, use in everything.items():
        try:
            use()
        except UsageError as error:
            if "belongs to the process that forked this one" not in str(error):
                problems.append(f"{name}: {error}")
        except Exception as error:
            problems.append(f"{name}: {error!r}")
        else:
            problems.append(f"{name}: no error")
    samples = {sample.name for family in collector.collect() for sample in family.samples}
    assert samples == {"raft_pipeline_lost_log_lines_total"}  # of this process
    answer: list[Any] = []
    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": "/raft", "SERVER_PROTOCOL": "HTTP/1.1"}
    wsgi(environ, lambda *arguments: answer.extend(arguments))  # type: ignore[arg-type, func-returns-value]
    assert answer[0].startswith("503 "), answer
    request = Request("POST", "/raft", peer_headers(), "127.0.0.1:1")
    assert transport.handlers.check(request).status == 503  # type: ignore[union-attr]
    for thing in (transport, awaited, listener, running, pipeline, inbox, awaited_inbox):
        assert "of the process that forked" in repr(thing)
    assert transport.stop() == pipeline.stop() == 0
    transport.__exit__(None, None, None)
    pipeline.__exit__(None, None, None)
    listener.close()
    assert asyncio.run(awaited.stop()) == 0
    asyncio.run(awaited.__aexit__(None, None, None))
    with Transport(5, CLUSTER, FakeRaft()) as own:
        own.add_peer(2, [server.url])
        own.send([message()])
        eventually(lambda: own.stats()[2].sent == 1)
    del transport, awaited, listener, running, pipeline, everything, own
    del inbox, awaited_inbox, taking, awaited_taking
    gc.collect()
    for problem in problems:
        print(problem)
    sys.exit(1 if problems else 0)  # with atexit handlers and all
if os.waitpid(child, 0)[1] != 0:
    sys.exit("the child failed")

transport.send([message()])
eventually(lambda: transport.stats()[2].sent == 2)
running.cancel()
over.set()
transport.stop()
pipeline.stop()
loop.run_until_complete(awaited.stop())
loop.run_until_complete(awaited_taking.stop())
loop.close()
assert not inbox.closed
for node in taking:
    node.stop()
assert inbox.closed
server.stop()
print("ok")
