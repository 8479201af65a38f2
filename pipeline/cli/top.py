"""``raft-pipeline top``: peers, rates, queues and failures of nodes, out of their /metrics.

Ours and etcd's alike: whatever of docs/metrics.md a node exposes is shown.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias

import click
import urllib3
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.cli.options import json_option

__all__ = ["Node", "Row", "ago", "judge", "parse", "top"]

#: A name and its labels, in order.
Series: TypeAlias = tuple[str, tuple[tuple[str, str], ...]]
Scrape: TypeAlias = Mapping[Series, float]

_LINE = re.compile(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(.)")

#: A scrape that is larger is not of a node.
SCRAPE_MAX = 16 << 20
#: What should be zero, and what it means if it is not.
_SHOULD_BE_ZERO = {
    "raft_pipeline_callback_errors_total": "callbacks raised",
    "raft_pipeline_process_failures_total": "calls of process raised",
    "raft_pipeline_unknown_fields_total": "messages lost fields",
    "raft_pipeline_unknown_messages_total": "messages of a later raft",
    "raft_pipeline_lost_log_lines_total": "log lines lost",
    "raft_pipeline_listener_handshake_failures_total": "TLS handshakes failed",
    "raft_pipeline_inbox_waiting_requests": "requests wait for the inbox",
}


@dataclass(kw_only=True)
class Row:
    """A peer of a node. None is what the node does not say, or a rate that is not known yet."""

    local: str
    peer: str
    is_active: bool | None = None
    #: Streams that are up, of those there are.
    streams_up: int | None = None
    streams: int | None = None
    sent_per_s: float | None = None
    bytes_per_s: float | None = None
    failed_per_s: float | None = None
    refused_per_s: float | None = None
    #: Ever.
    failed: int | None = None
    queued: int | None = None
    queued_bytes: int | None = None
    in_flight: int | None = None
    #: Why the last failure was, in one word (``explain``), and how many seconds ago.
    last_error: str | None = None
    last_error_s: float | None = None
    #: Of the probes since the last scrape, or ever if there was none.
    rtt_ms: float | None = None


@dataclass(kw_only=True)
class Node:
    """What one URL said."""

    url: str
    error: str = ""
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse(text: str) -> dict[Series, float]:
    """Read Prometheus' text format; lines that are none of its samples are passed over."""
    found: dict[Series, float] = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None or line.startswith("#"):
            continue
        labels = tuple(
            (name, _ESCAPED.sub(lambda m: {"n": "\n"}.get(m[1], m[1]), value))
            for name, value in _LABEL.findall(match[2] or "")
        )
        try:
            found[match[1], labels] = float(match[3])
        except ValueError:
            continue
    return found


def judge(url: str, now: Scrape, before: Scrape | None, seconds: float) -> Node:
    """Make of two scrapes, so many seconds apart, what is to be shown."""
    node = Node(url=url)
    rows: dict[tuple[str, str], Row] = {}
    for _, labels in now:
        about = dict(labels)
        peer = about.get("To") or about.get("Remote")
        if peer and "Local" in about:
            local = about["Local"]
            rows.setdefault((local, peer), Row(local=local, peer=peer))
    peers = {peer for _, peer in rows}
    for name, labels in now:  # an etcd's own series say To, and not of whom
        about = dict(labels)
        if name.startswith("etcd_network_peer_") and about.get("To", "") not in ("", *peers):
            rows[("", about["To"])] = Row(local="", peer=about["To"])
    for (local, peer), row in rows.items():
        earlier = None if before is None else _Of(before, local, peer)
        _fill(row, _Of(now, local, peer), earlier, seconds)
    node.rows = [rows[key] for key in sorted(rows)]
    for name, meaning in _SHOULD_BE_ZERO.items():
        if total := sum(value for (series, _), value in now.items() if series == name):
            node.notes.append(f"{total:.0f} {meaning}")
    for (name, _), value in now.items():
        if name == "raft_pipeline_certificate_expiry_days" and value < 7:
            node.notes.append(f"the certificate expires in {value:.1f} days")
    return node


class _Of:
    """The series of one peer, in one scrape."""

    def __init__(self, scrape: Scrape, local: str, peer: str) -> None:
        self._found: dict[str, list[float]] = {}
        self._errors: list[tuple[str, float]] = []
        for (name, labels), value in scrape.items():
            about = dict(labels)
            if about.get("To", about.get("Remote")) == peer and about.get("Local", local) == local:
                self._found.setdefault(name, []).append(value)
                if name == "raft_pipeline_peer_last_error_timestamp_seconds":
                    self._errors.append((about.get("Verdict", ""), value))

    def total(self, name: str) -> float | None:
        """Return the sum of a name's series; None if there is none."""
        values = self._found.get(name)
        return None if values is None else sum(values)

    def count(self, name: str) -> int:
        """Return how many series a name has."""
        return len(self._found.get(name, ()))

    def last_error(self) -> tuple[str, float] | None:
        """Return the verdict of the last failure, and when it was."""
        return max(self._errors, key=lambda it: it[1], default=None)

    def whole(self, name: str) -> int | None:
        """Return ``total`` as an int."""
        total = self.total(name)
        return None if total is None or not math.isfinite(total) else int(total)


def _fill(row: Row, now: _Of, before: _Of | None, seconds: float) -> None:
    def rate(name: str) -> float | None:
        last, first = now.total(name), None if before is None else before.total(name)
        if last is None or first is None or seconds <= 0:
            return None
        # A counter that is lower began anew.
        return round((last - first if last >= first else last) / seconds, 1)

    active = now.total("etcd_network_active_peers")
    row.is_active = None if active is None else active > 0
    if streams := now.count("raft_pipeline_stream_up"):
        row.streams, row.streams_up = streams, now.whole("raft_pipeline_stream_up")
    row.sent_per_s = rate("raft_pipeline_sent_messages_total")
    row.bytes_per_s = rate("etcd_network_peer_sent_bytes_total")
    row.refused_per_s = rate("raft_pipeline_refused_messages_total")
    failures = "raft_pipeline_failed_messages_total"
    if now.total(failures) is None:
        failures = "etcd_network_peer_sent_failures_total"
    row.failed_per_s, row.failed = rate(failures), now.whole(failures)
    row.queued = now.whole("raft_pipeline_queued_messages")
    row.queued_bytes = now.whole("raft_pipeline_queued_bytes")
    row.in_flight = now.whole("raft_pipeline_in_flight_messages")
    name = "etcd_network_peer_round_trip_time_seconds"
    total, count = now.total(f"{name}_sum") or 0.0, now.total(f"{name}_count") or 0.0
    if before is not None:
        earlier_total, earlier = before.total(f"{name}_sum"), before.total(f"{name}_count")
        if earlier_total is not None and earlier is not None and count > earlier:
            total, count = total - earlier_total, count - earlier
    row.rtt_ms = round(1000 * total / count, 3) if count else None
    if (last := now.last_error()) is not None:
        row.last_error, at = last
        row.last_error_s = round(max(0.0, time.time() - at), 1)


class _Watch:
    """The nodes that are looked at, and what they said last."""

    def __init__(self, urls: tuple[str, ...], manager: urllib3.PoolManager) -> None:
        self._urls = urls
        self._manager = manager
        self._before: dict[str, tuple[float, Scrape]] = {}
        self._threads = ThreadPoolExecutor(len(urls))  # one that hangs delays no other

    def look(self) -> list[Node]:
        """Ask all of them."""
        return list(self._threads.map(self._look, self._urls))

    def _look(self, url: str) -> Node:
        try:
            answer = self._manager.request("GET", url, preload_content=False)
            try:
                if answer.status != 200:
                    return Node(url=url, error=f"answered with status {answer.status}")
                now = parse(answer.read(SCRAPE_MAX, decode_content=True).decode("utf-8", "replace"))
            finally:
                answer.release_conn()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            return Node(url=url, error=str(error))
        at = time.monotonic()
        began, before = self._before.get(url, (at, None))
        self._before[url] = at, now
        node = judge(url, now, before, at - began)
        if not node.rows and not node.error:
            node.notes.append("no series of a peer: see docs/metrics.md")
        return node

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)
        self._manager.clear()


def _table(nodes: list[Node]) -> Group:
    table = Table(box=None)
    table.add_column("node")
    table.add_column("peer")
    table.add_column("state")
    for name in ("streams", "sent/s", "KiB/s", "failed/s", "refused/s", "failed", "queued"):
        table.add_column(name, justify="right")
    for name in ("queued KiB", "in flight", "rtt ms"):
        table.add_column(name, justify="right")
    table.add_column("last failure")
    notes: list[Text] = []
    for node in nodes:
        if node.error:
            notes.append(Text(f"{node.url}: {node.error}", style="red"))
        notes += [Text(f"{node.url}: {note}", style="yellow") for note in node.notes]
        for row in node.rows:
            table.add_row(*_cells(node, row), style="red" if row.is_active is False else "")
    return Group(table, *notes)


def _cells(node: Node, row: Row) -> list[str]:
    def show(value: float | None, per: int = 1) -> str:
        return (
            "" if value is None else f"{value / per:,.10g}" if per == 1 else f"{value / per:,.1f}"
        )

    state = {None: "", True: "active", False: "INACTIVE"}[row.is_active]
    streams = "" if row.streams is None else f"{row.streams_up}/{row.streams}"
    return [
        row.local or node.url,
        row.peer,
        state,
        streams,
        show(row.sent_per_s),
        show(row.bytes_per_s, 1024),
        show(row.failed_per_s),
        show(row.refused_per_s),
        show(row.failed),
        show(row.queued),
        show(row.queued_bytes, 1024),
        show(row.in_flight),
        show(row.rtt_ms),
        "" if row.last_error_s is None else f"{row.last_error}, {ago(row.last_error_s)} ago",
    ]


def ago(seconds: float) -> str:
    """Write how long ago something was."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _metrics_url(text: str) -> str:
    try:
        parsed = urllib3.util.parse_url(text)
    except urllib3.exceptions.LocationParseError as error:
        raise click.BadParameter(str(error)) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise click.BadParameter(f"{text!r} is not an http or https URL")
    return text if parsed.path not in (None, "", "/") else text.rstrip("/") + "/metrics"


@click.command()
@click.argument("urls", type=_metrics_url, metavar="URL...", nargs=-1, required=True)
@click.option("--interval", type=click.FloatRange(0.05), default=1.0, show_default=True)
@click.option("--count", type=click.IntRange(0), default=0, help="Looks; 0 for no end.")
@click.option("--cert", type=_FILE, help="A certificate to show, PEM.")
@click.option("--key", type=_FILE)
@click.option("--cacert", type=_FILE, help="Who signs theirs, PEM.")
@json_option
def top(
    *,
    urls: tuple[str, ...],
    interval: float,
    count: int,
    cert: Path | None,
    key: Path | None,
    cacert: Path | None,
    as_json: bool,
) -> None:
    """Watch the peers of nodes, out of the /metrics at each URL: rates, queues, failures.

    Without a path, /metrics is asked for. With --json there is one object on each line, for each
    look; rates are of the time since the look before. The last failure of a peer is one word:
    explain says what it means, and probe finds out more. The exit code is 1 if at the last look a
    URL did not answer or a peer was inactive.
    """
    manager = urllib3.PoolManager(
        timeout=urllib3.Timeout(total=max(interval, 1.0)),
        retries=False,
        cert_file=None if cert is None else str(cert),
        key_file=None if key is None else str(key),
        ca_certs=None if cacert is None else str(cacert),
    )
    watch = _Watch(urls, manager)
    nodes: list[Node] = []
    try:
        with Live(console=Console(quiet=as_json), auto_refresh=False) as live:
            looks = 0
            while True:
                nodes = watch.look()
                looks += 1
                if as_json:
                    said = {"time": time.time(), "nodes": [asdict(node) for node in nodes]}
                    click.echo(json.dumps(said))
                    sys.stdout.flush()
                else:
                    live.update(_table(nodes), refresh=True)
                if looks == count:
                    break
                time.sleep(interval)
    except KeyboardInterrupt:
        pass
    finally:
        watch.close()
    is_well = all(
        not node.error and all(row.is_active is not False for row in node.rows) for node in nodes
    )
    sys.exit(0 if is_well else 1)
