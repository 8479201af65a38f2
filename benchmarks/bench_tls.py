"""What mutual TLS costs: the same messages, plain and encrypted.

The sender is measured with a server in Python, the receiver with our own sender; the other end is
a process of its own each time.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from harness import HERE, Pacer, Subject, running
from pytest_benchmark.fixture import BenchmarkFixture

from pipeline import SendResult, TLSInfo
from pipeline.tls import Credentials

#: Bytes of the one entry: messages in a round. The large one is that of P3.
MESSAGES = {128: 2000, 64 << 20: 4}
ROUNDS = 3


@pytest.fixture
def info(tmp_path: Path) -> TLSInfo:
    """One certificate, for both ends."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    files = {"cert_file": tmp_path / "cert", "key_file": tmp_path / "key"}
    issued.cert_chain_pems[0].write_to_path(files["cert_file"])
    issued.private_key_pem.write_to_path(files["key_file"])
    authority.cert_pem.write_to_path(tmp_path / "ca")
    return TLSInfo(**files, trusted_ca_file=tmp_path / "ca")


@contextmanager
def serving(command: list[str], info: TLSInfo | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Run a server in a process of its own; its port, and what it says when it ends."""
    files = [info.cert_file, info.key_file, info.trusted_ca_file] if info else []
    command = [sys.executable, *command, *map(str, files)]
    said: dict[str, Any] = {}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline().removeprefix("listening ")), said
        out, _ = process.communicate()
        said.update(json.loads(out or "{}"))


def send(subject: Subject, messages: int, pacer: Pacer) -> None:
    """Send so many and wait until all have been answered."""
    accepted, burst = 0, 0
    while accepted < messages:
        if subject.pipe.send(subject.build(accepted)) is SendResult.ACCEPTED:
            accepted += 1
            burst += 1
        else:
            pacer(burst)
            burst = 0
    subject.drain(poll_s=1e-3)


@pytest.mark.parametrize("scheme", ["plain", "tls"])
@pytest.mark.parametrize("size", MESSAGES, ids=lambda n: f"MsgApp-{n}B")
def test_cpu_of_the_sender(
    benchmark: BenchmarkFixture, info: TLSInfo, scheme: str, size: int
) -> None:
    tls = info if scheme == "tls" else None
    credentials = Credentials(info) if tls else None
    messages = MESSAGES[size]
    with (
        serving([str(HERE / "tls_sink.py")], tls) as (port, _),
        running("core", port, size, credentials=credentials) as subject,
    ):
        pacer = Pacer()
        send(subject, messages, pacer)  # dials, and lets the pacer find its length
        before = resource.getrusage(resource.RUSAGE_SELF)
        benchmark.pedantic(send, (subject, messages, pacer), rounds=ROUNDS)
        after = resource.getrusage(resource.RUSAGE_SELF)
        stats = subject.pipe.stats()
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    benchmark.extra_info["cpu_us_per_message"] = cpu_s * 1e6 / (ROUNDS * messages)
    assert stats.sent == stats.accepted == (ROUNDS + 1) * messages


@pytest.mark.parametrize("scheme", ["plain", "tls"])
@pytest.mark.parametrize("size", MESSAGES, ids=lambda n: f"MsgApp-{n}B")
def test_cpu_of_the_receiver(
    benchmark: BenchmarkFixture, info: TLSInfo, scheme: str, size: int
) -> None:
    """All that the receiving process takes from its first connection on, handshakes as well."""
    tls = info if scheme == "tls" else None
    credentials = Credentials(info) if tls else None
    messages = MESSAGES[size]
    with (
        serving([str(HERE / "receive.py"), "core"], tls) as (port, received),
        running("core", port, size, credentials=credentials) as subject,
    ):
        benchmark.pedantic(send, (subject, messages, Pacer()), rounds=ROUNDS)
    assert received["total"] == ROUNDS * messages
    benchmark.extra_info["cpu_us_per_message"] = received["cpu_us_per_message"]
    benchmark.extra_info["peak_mib"] = received["peak_mib"]
