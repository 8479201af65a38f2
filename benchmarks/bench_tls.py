"""What mutual TLS costs the sender: the same messages, plain and encrypted, to the same server."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme
from harness import HERE, Pacer, running
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
def sink(info: TLSInfo | None) -> Iterator[int]:
    """Run the server in a process of its own; its port."""
    files = [info.cert_file, info.key_file, info.trusted_ca_file] if info else []
    command = [sys.executable, str(HERE / "tls_sink.py"), *map(str, files)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield int(process.stdout.readline().removeprefix("listening "))
        process.stdin.close()


@pytest.mark.parametrize("scheme", ["plain", "tls"])
@pytest.mark.parametrize("size", MESSAGES, ids=lambda n: f"MsgApp-{n}B")
def test_cpu_of_the_sender(
    benchmark: BenchmarkFixture, info: TLSInfo, scheme: str, size: int
) -> None:
    tls = info if scheme == "tls" else None
    credentials = Credentials(info) if tls else None
    messages = MESSAGES[size]
    with sink(tls) as port, running("core", port, size, credentials=credentials) as subject:
        pacer = Pacer()

        def deliver() -> None:
            accepted, burst = 0, 0
            while accepted < messages:
                if subject.pipe.send(subject.build(accepted)) is SendResult.ACCEPTED:
                    accepted += 1
                    burst += 1
                else:
                    pacer(burst)
                    burst = 0
            subject.drain(poll_s=1e-3)

        deliver()  # dials, and lets the pacer find its length
        before = resource.getrusage(resource.RUSAGE_SELF)
        benchmark.pedantic(deliver, rounds=ROUNDS)
        after = resource.getrusage(resource.RUSAGE_SELF)
        stats = subject.pipe.stats()
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    benchmark.extra_info["cpu_us_per_message"] = cpu_s * 1e6 / (ROUNDS * messages)
    assert stats.sent == stats.accepted == (ROUNDS + 1) * messages
