"""``raft-pipeline bench``: what the way to a peer bears, and what it costs here.

The messages are MsgHup with a context, which are a process' own: a node of ours answers them 204
and counts them as ``ignored``, and an etcd's raft lets them go. So a member in service can be
asked, but it has the load. All go by posts: a stream is dialled by the peer.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from pipeline import (
    Inbox,
    Message,
    MessageType,
    PipelineConfig,
    PipelineStats,
    TLSInfo,
    Transport,
    TransportConfig,
    UsageError,
    parse_id,
)
from pipeline.cli.exchange import Exchange, ExchangeError
from pipeline.cli.nodes import Quiet
from pipeline.cli.options import json_option, member_id, peer_url, tls_of, tls_options
from pipeline.cli.probe import probe_peer
from pipeline.reasons import EXIT_FAILED, explanation_of
from pipeline.wire.protocol import probe_head

__all__ = ["Measured", "bench"]

#: Messages handed on at once.
BATCH = 32
#: When the queue is full: some of it has gone by then.
FULL_S = 0.0005
#: Between two looks at the books, and between two round trips.
LOOK_S = 0.1
ROUND_TRIP_S = 0.01
#: For what is queued at the end.
DRAIN_S = 10.0

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60


@dataclass(kw_only=True)
class Measured:
    """What a run came to."""

    url: str
    message_bytes: int
    connections: int
    seconds: float = 0.0
    #: Of the command, all its threads.
    cpu_seconds: float = 0.0
    books: PipelineStats | None = None
    #: Messages a second, in each tenth of a second or so.
    rates: list[float] = field(default_factory=list)
    #: Seconds of round trips of probes beside the load, on a connection of their own.
    round_trips: list[float] = field(default_factory=list)
    #: Why the last message failed.
    reason: str = ""

    def rtt_ms(self, quantile: float) -> float | None:
        """Return the milliseconds that this share (0..1) of the round trips stayed within."""
        if not self.round_trips:
            return None
        ordered = sorted(self.round_trips)
        return round(1000 * ordered[min(len(ordered) - 1, int(len(ordered) * quantile))], 3)

    def as_json(self) -> dict[str, Any]:
        """Return all of it for programs."""
        assert self.books is not None
        sent = self.books.sent
        return {
            "url": self.url,
            "message_bytes": self.message_bytes,
            "connections": self.connections,
            "seconds": round(self.seconds, 6),
            "messages_per_s": round(sent / self.seconds, 1),
            "bytes_per_s": round(self.books.sent_bytes / self.seconds, 1),
            "cpu_us_per_message": round(1e6 * self.cpu_seconds / sent, 2) if sent else None,
            "rtt_ms": {f"p{n}": self.rtt_ms(n / 100) for n in (50, 90, 99)},
            "round_trips": len(self.round_trips),
            "rates": self.rates,
            "books": self.books._asdict(),
            "reason": self.reason,
        }


def _run(
    found: Measured,
    transport: Transport,
    message: Message,
    *,
    seconds: float,
    messages: int | None,
) -> None:
    """Send for so long, or so many, and look at the books meanwhile."""
    peer_id = message.to
    began, cpu = time.monotonic(), time.process_time()
    looked_at, accepted, sent_before = began, 0, 0
    while True:
        now = time.monotonic()
        if now >= looked_at + LOOK_S:
            sent = transport.stats()[peer_id].sent
            found.rates.append(round((sent - sent_before) / (now - looked_at), 1))
            sent_before, looked_at = sent, now
        left = BATCH if messages is None else min(BATCH, messages - accepted)
        if left <= 0 or now >= began + seconds:
            break
        refused = transport.send([message] * left)
        accepted += left - refused
        if refused:
            time.sleep(FULL_S)
    deadline = time.monotonic() + DRAIN_S
    while True:
        books = transport.stats()[peer_id]
        if not books.queued + books.in_flight or time.monotonic() >= deadline:
            break
        time.sleep(FULL_S)
    found.books = books
    found.seconds = time.monotonic() - began
    found.cpu_seconds = time.process_time() - cpu
    last = transport.peer_stats()[peer_id].last_error
    found.reason = last.text if last is not None and books.failed else ""


class _RoundTrips:
    """Asks the peer now and then how long an answer takes, in a thread, beside the load."""

    def __init__(self, url: str, tls: TLSInfo | None, timeout_s: float, took: list[float]) -> None:
        self._url, self._tls, self._timeout_s, self._took = url, tls, timeout_s, took
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._go, name="round-trips")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _go(self) -> None:
        request = probe_head(self._url)
        with Exchange(self._url, tls=self._tls, timeout_s=self._timeout_s) as exchange:
            while not self._is_over.wait(ROUND_TRIP_S):
                with contextlib.suppress(ExchangeError):  # the books say it
                    self._took.append(exchange.time(request)[0])


@click.command()
@click.argument("url", type=peer_url, metavar="URL")
@click.option("--size", type=click.IntRange(0, 1 << 24), default=128, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1, 86400), default=5.0, show_default=True)
@click.option("--messages", type=click.IntRange(1), help="Send so many, within the seconds.")
@click.option("--connections", type=click.IntRange(1, 64), default=4, show_default=True)
@click.option("--cluster-id", type=member_id, metavar="HEX", help="By default the peer's own.")
@click.option("--as-member", type=member_id, metavar="HEX", default="1", help="Who we say we are.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.01, 3600),
    default=2.0,
    show_default=True,
    help="Seconds to connect, and for each answer.",
)
@tls_options
@json_option
def bench(
    *,
    url: str,
    size: int,
    seconds: float,
    messages: int | None,
    connections: int,
    cluster_id: int | None,
    as_member: int,
    timeout_s: float,
    cert: Path | None,
    key: Path | None,
    cacert: Path | None,
    server_name: str | None,
    as_json: bool,
) -> None:
    """Load the peer at URL with messages that no node does anything with, and say what came of it.

    It is asked first as probe does, and with a sick peer it ends there, with its verdict. The exit
    code is 1 if a message failed.
    """
    tls = tls_of(url, cert=cert, key=key, cacert=cacert, server_name=server_name)
    peer_id = 1 if as_member != 1 else 2
    message = Message(
        type=MessageType.HUP, from_=as_member, to=peer_id, context=bytes(size) if size else None
    )
    found = Measured(url=url, message_bytes=message.byte_size(), connections=connections)
    try:
        asked = probe_peer(url, tls=tls, cluster_id=cluster_id, count=1, timeout_s=timeout_s)
        if asked.exit_code:
            said = {"verdict": asked.verdict, "reason": asked.reason, "line": asked.line}
            click.echo(json.dumps(said, indent=2) if as_json else asked.line)
            sys.exit(asked.exit_code)
        config = TransportConfig(
            pipeline=PipelineConfig(
                connections=connections,
                dial_timeout_s=timeout_s,
                unreachable_reports="change",
            ),
            probe_interval_s=0,
            streams=False,
        )
        cluster = parse_id(asked.cluster_id or "0") if cluster_id is None else cluster_id
        transport = Transport(as_member, cluster, Quiet(), inbox=Inbox(), tls=tls, config=config)
        with transport:
            transport.add_peer(peer_id, [url])
            with _RoundTrips(url, tls, timeout_s, found.round_trips):
                _run(found, transport, message, seconds=seconds, messages=messages)
    except UsageError as error:
        raise click.UsageError(str(error)) from error
    said = found.as_json()
    if as_json:
        click.echo(json.dumps(said, indent=2))
    else:
        _print(found, said)
    assert found.books is not None
    sys.exit(EXIT_FAILED if found.books.failed or not found.books.sent else 0)


def _print(found: Measured, said: dict[str, Any]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    assert found.books is not None
    books = found.books
    console.print(
        f"{books.sent:,} messages of {found.message_bytes} bytes in {found.seconds:.2f} s over "
        f"{found.connections} connections"
    )
    console.print(
        f"{said['messages_per_s']:,.0f} a second, {said['bytes_per_s'] / 1e6:,.1f} MB/s, "
        f"{said['cpu_us_per_message'] or 0:.1f} us of CPU here for each"
    )
    if found.rates:
        console.print(
            f"messages a second, 0 to {max(found.rates):,.0f}:\n  {sparkline(found.rates)}"
        )
    if found.round_trips:
        rtt = said["rtt_ms"]
        console.print(
            f"{len(found.round_trips)} round trips beside it: p50 {rtt['p50']} ms, "
            f"p90 {rtt['p90']} ms, p99 {rtt['p99']} ms"
        )
        for line in histogram(found.round_trips):
            console.print(line)
    if books.failed:
        explanation = explanation_of(found.reason)
        console.print(f"{books.failed:,} failed, the last one: {found.reason}")
        console.print(f"{explanation.verdict}: {explanation.meaning}\n{explanation.advice}")


def sparkline(values: list[float]) -> str:
    """Draw values from 0 up as one line, the mean of several where there are too many."""
    step = math.ceil(len(values) / _WIDTH)
    parts = [values[i : i + step] for i in range(0, len(values), step)]
    means = [sum(part) / len(part) for part in parts]
    top = max(means) or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int(mean / top * len(_BARS)))] for mean in means)


def histogram(seconds: list[float]) -> list[str]:
    """Draw times as bars, a line for each doubling."""
    counts: dict[int, int] = {}
    for value in seconds:
        doubling = math.floor(math.log2(max(value, 1e-9)))
        counts[doubling] = counts.get(doubling, 0) + 1
    most = max(counts.values())
    lines = []
    for doubling in range(min(counts), max(counts) + 1):
        count = counts.get(doubling, 0)
        bar = "█" * math.ceil(count / most * _WIDTH)
        lines.append(f"  {1000 * 2.0**doubling:>9.3f} ms {count:>6} {bar}")
    return lines
