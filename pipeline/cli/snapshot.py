"""``raft-pipeline snapshot``: send a database to a peer, or receive those that peers send."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Self

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from pipeline import (
    ConfState,
    Inbox,
    Message,
    MessageType,
    PipelineError,
    ReceiverConfig,
    Snapshot,
    SnapshotCancelledError,
    SnapshotMetadata,
    SnapshotTransfer,
    Transport,
    TransportConfig,
    UsageError,
    format_id,
)
from pipeline.cli.messages import describe
from pipeline.cli.nodes import Quiet
from pipeline.cli.options import json_option, member_id, peer_url, tls_of, tls_options
from pipeline.reasons import explanation_of

__all__ = ["snapshot"]

#: How often the bar moves, and a signal is looked for.
TICK_S = 0.1
#: 128 + SIGINT, as a shell has it.
EXIT_INTERRUPTED = 130


@click.group()
def snapshot() -> None:
    """Send a database to a peer, or receive those that peers send."""


def _columns() -> Iterator[ProgressColumn]:
    """Make what a bar shows; each bar needs its own."""
    yield TextColumn("{task.description:9}")
    yield BarColumn()
    yield DownloadColumn()
    yield TransferSpeedColumn()
    yield TimeRemainingColumn()


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of raising, for what is begun is to be ended in order."""
    found: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        found.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield found
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@snapshot.command()
@click.argument("url", type=peer_url, metavar="URL")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--cluster-id", type=member_id, metavar="HEX", required=True)
@click.option("--from", "from_", type=member_id, metavar="HEX", required=True, help="Who sends.")
@click.option("--to", type=member_id, metavar="HEX", required=True, help="Who is to take it.")
@click.option("--index", type=click.IntRange(1), required=True, help="Of the last entry in it.")
@click.option("--term", type=click.IntRange(1), required=True, help="Of that entry.")
@click.option("--voter", "voters", type=member_id, metavar="HEX", multiple=True, help="Repeated.")
@click.option("--learner", "learners", type=member_id, metavar="HEX", multiple=True)
@click.option("--rate", type=click.FloatRange(1.0), help="Bytes a second at most.")
@click.option(
    "--server-version",
    default=TransportConfig().server_version,
    show_default=True,
    help="The version that we claim.",
)
@tls_options
@json_option
def send(
    *,
    url: str,
    file: Path,
    cluster_id: int,
    from_: int,
    to: int,
    index: int,
    term: int,
    voters: tuple[int, ...],
    learners: tuple[int, ...],
    rate: float | None,
    server_version: str,
    cert: Path | None,
    key: Path | None,
    cacert: Path | None,
    server_name: str | None,
    as_json: bool,
) -> None:
    """Send FILE, a database, to the peer at URL behind a MsgSnap.

    The peer takes it as a snapshot of its leader: it replaces what it has. The exit codes are those
    of probe; 130 if it was interrupted.
    """
    tls = tls_of(url, cert=cert, key=key, cacert=cacert, server_name=server_name)
    message = Message(
        type=MessageType.SNAP,
        from_=from_,
        to=to,
        term=term,
        snapshot=Snapshot(
            metadata=SnapshotMetadata(
                index=index,
                term=term,
                conf_state=ConfState(voters=voters, learners=learners),
            )
        ),
    )
    began = time.monotonic()
    error: PipelineError | None = None
    try:
        config = TransportConfig(
            server_version=server_version,
            snapshot_rate_limit=rate,
            probe_interval_s=0,
            streams=False,
        )
        transport = Transport(from_, cluster_id, Quiet(), inbox=Inbox(), tls=tls, config=config)
        with _interrupts() as interrupts, transport:
            transport.add_peer(to, [url])
            transfer = transport.send_snapshot(message, file)
            _follow(transfer, interrupts, Console(quiet=as_json, stderr=True))
            try:
                transfer.result()
            except UsageError:
                raise
            except PipelineError as failure:
                error = failure
    except UsageError as failure:
        raise click.UsageError(str(failure)) from failure
    reason = "" if error is None else str(error)
    found = None if error is None else explanation_of(reason)
    said = {
        "verdict": "ok" if found is None else found.verdict,
        "reason": reason,
        "meaning": "" if found is None else found.meaning,
        "advice": "" if found is None else found.advice,
        "sent_bytes": transfer.progress.sent_bytes,
        "total_bytes": transfer.progress.total_bytes,
        "seconds": round(time.monotonic() - began, 3),
    }
    if as_json:
        click.echo(json.dumps(said, indent=2))
    elif found is None:
        click.echo(f"sent {said['sent_bytes']} bytes to {format_id(to)} in {said['seconds']} s")
    else:
        click.echo(
            f"what to do: {found.advice}\n{url}: {found.verdict}: {found.meaning} ({reason})"
        )
    if isinstance(error, SnapshotCancelledError):
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0 if found is None else found.exit_code)


def _follow(transfer: SnapshotTransfer, interrupts: list[int], console: Console) -> None:
    """Show how far it is until it has ended."""
    with Progress(*_columns(), console=console) as progress:
        task = progress.add_task("waiting", total=transfer.progress.total_bytes)
        while not transfer.done():
            if interrupts:
                transfer.cancel()
            now = transfer.progress
            progress.update(task, description=now.phase, completed=now.sent_bytes)
            time.sleep(TICK_S)
        progress.update(
            task, description=transfer.progress.phase, completed=transfer.progress.sent_bytes
        )


@snapshot.command()
@click.argument("url", metavar="URL")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--cluster-id", type=member_id, metavar="HEX", required=True)
@click.option("--member-id", "ours", type=member_id, metavar="HEX", required=True, help="Ours.")
@click.option("--count", type=click.IntRange(1), default=1, show_default=True, help="Then end.")
@click.option(
    "--max-bytes", type=click.IntRange(1), help="Of one database; larger ones are refused."
)
@click.option(
    "--server-version",
    default=TransportConfig().server_version,
    show_default=True,
    help="The version that we claim.",
)
@tls_options
@json_option
def receive(
    *,
    url: str,
    directory: Path,
    cluster_id: int,
    ours: int,
    count: int,
    max_bytes: int | None,
    server_version: str,
    cert: Path | None,
    key: Path | None,
    cacert: Path | None,
    server_name: str | None,
    as_json: bool,
) -> None:
    """Listen at URL as a member, and store the databases of snapshots in DIRECTORY.

    Each is told when it is whole and on the disk; messages that come besides are taken and dropped.
    With --json there is one object on each line, the first one with the URL.
    """
    tls = tls_of(url, cert=cert, key=key, cacert=cacert, server_name=server_name)
    inbox: Inbox[Message] = Inbox()
    try:
        receiver = ReceiverConfig(snapshot_dir=directory, snapshot_max_bytes=max_bytes)
        config = TransportConfig(
            receiver=receiver, server_version=server_version, probe_interval_s=0
        )
        transport = Transport(ours, cluster_id, Quiet(), inbox=inbox, tls=tls, config=config)
        with _interrupts() as interrupts, transport:
            listener = transport.listen(url)
            _say(as_json, f"listening at {listener.url}", {"url": listener.url})
            taken = 0
            with Arriving(transport, Console(quiet=as_json, stderr=True)) as arriving:
                while taken < count and not interrupts:
                    for message in inbox.take(timeout=TICK_S):
                        if message.type == MessageType.SNAP:
                            taken += 1
                            arriving.end()
                            _tell(message, directory, as_json)
                    arriving.show()
    except UsageError as error:
        raise click.UsageError(str(error)) from error
    except OSError as error:
        raise click.ClickException(str(error)) from error
    sys.exit(0 if taken >= count else EXIT_INTERRUPTED)


class Arriving:
    """Shows how far the databases are that are arriving, together, while there are any."""

    def __init__(self, transport: Transport, console: Console) -> None:
        self._transport = transport
        self.progress = Progress(*_columns(), console=console, transient=True)
        self._task: TaskID | None = None
        self._begin = 0  # bytes received before

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self) -> None:
        """Look how far they are."""
        now = self._transport.snapshot()
        left, received = now.received_snapshot_left_bytes, now.received_snapshot_bytes
        if not any(counts.in_flight for counts in now.received_snapshots.values()):
            self.end()
            self._begin = received
            return
        if self._task is None:
            self._task = self.progress.add_task("receiving", total=None)
        done = received - self._begin
        # One that comes in chunks does not say how long it is.
        total = None if left is None else done + left
        self.progress.update(self._task, completed=done, total=total)

    def end(self) -> None:
        """Take the bar away."""
        if self._task is not None:
            self.progress.remove_task(self._task)
            self._task = None


def _tell(message: Message, directory: Path, as_json: bool) -> None:
    assert message.snapshot is not None
    index = message.snapshot.metadata.index
    path = directory / f"{index:016x}.snap.db"
    about = describe(message, 0)
    # One that came by /raft has no database behind it.
    size = path.stat().st_size if path.exists() else None
    text = f"snapshot {index} of {about['from']}: {size} bytes in {path}"
    _say(as_json, text, {"message": about, "bytes": size, "path": str(path)})


def _say(as_json: bool, text: str, about: dict[str, object]) -> None:
    click.echo(json.dumps(about) if as_json else text)
    sys.stdout.flush()
