"""``examples/three_nodes.py``, as a user runs it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from pipeline import Entry, TransportConfig
from pipeline.examples import three_nodes
from pipeline.examples.etcd import (
    config_beside,
    find_etcd,
    free_port,
    put_of,
    put_request,
    puts_in,
)
from pipeline.examples.three_nodes import Put
from tests.support import has_trustme
from tests.support.etcd import hide_etcds, make_pretender
from tests.support.processes import TIMEOUT_S, assert_nothing_is_left

#: It takes 12 s on an idle machine.
RUN_TIMEOUT_S = TIMEOUT_S


@pytest.mark.etcd
@pytest.mark.slow
def test_each_node_goes_and_comes_back_and_no_write_is_lost(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pipeline.examples.three_nodes"],
        env={**os.environ, "TMPDIR": os.fspath(tmp_path)},
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    told = iter(result.stdout.splitlines())
    for expected in (
        "etcd 3.* leads; we are * and *",
        "TLS everywhere, with certificates on both sides",
        "20 writes: both of ours have them",
        "certificates replaced, connections made anew; 40 writes: both have them",
        "one is gone, and etcd has noticed",
        "60 writes: committed by etcd and two; one has 40",
        "one is back and has caught up: 60",
        "etcd is gone; * leads in term *, elected by *",
        "80 writes: committed by one and two",
        "etcd is back and has caught up; 100 writes: both of ours have them",
        "etcd leads again, in term *",
        "two is gone and has lost its log; 220 writes: committed by etcd and one",
        "etcd was killed and is back without its old log, elected by one in term *",
        "two is back: etcd posted its database to /raft/snapshot, * bytes with 220 writes",
        "two goes on behind index *; 240 writes: both of ours have them",
        "one sent * messages in all its lives; * failed",
        "two sent * messages in all its lives; * failed",
        "etcd holds 240 of 240 writes",
        "one holds 240 of 240 writes",
        "two holds 240 of 240 writes",
        "240/240 writes are in all three",
    ):
        assert fnmatchcase(line := next(told), expected), line
    assert list(told) == []
    assert_nothing_is_left(tmp_path)


@pytest.mark.etcd
@has_trustme
def test_a_node_that_misses_a_write_ends_the_story(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def all_but_one(entry: Entry) -> Put | None:
        put = put_of(entry)
        return None if put is not None and put[0] == b"key 7" else put

    monkeypatch.setattr(tempfile, "tempdir", os.fspath(tmp_path))
    monkeypatch.setattr(three_nodes, "put_of", all_but_one)
    wait_writes = three_nodes.Node.wait_writes

    def wait_in_vain(node: three_nodes.Node, count: int) -> None:
        monkeypatch.setattr(three_nodes, "TIMEOUT_S", 1.0)
        wait_writes(node, count)

    monkeypatch.setattr(three_nodes.Node, "wait_writes", wait_in_vain)
    assert three_nodes.main([]) == 1
    assert capsys.readouterr().err == "not within 1 s: one has 20 writes\n"
    assert_nothing_is_left(tmp_path)


WRITTEN = {(b"key %d" % n, b"value") for n in range(3)}


@pytest.mark.parametrize("node", ["etcd", "one", "two"])
@pytest.mark.parametrize(
    ("held", "line"),
    [
        (WRITTEN - {(b"key 1", b"value")}, "holds 2 of 3 writes"),
        (
            WRITTEN - {(b"key 1", b"value")} | {(b"key 1", b"other")},
            "holds 2 of 3 writes and 1 that nobody made",
        ),
        (WRITTEN | {(b"key 3", b"value")}, "holds 3 of 3 writes and 1 that nobody made"),
    ],
    ids=["lost", "changed", "made up"],
)
def test_the_verdict_names_who_does_not_hold_the_same_writes(
    capsys: pytest.CaptureFixture[str], node: str, held: set[Put], line: str
) -> None:
    everybody = {"etcd": WRITTEN, "one": WRITTEN, "two": WRITTEN}
    assert three_nodes.tell_verdict(WRITTEN, everybody)
    capsys.readouterr()
    assert not three_nodes.tell_verdict(WRITTEN, {**everybody, node: held})
    told = capsys.readouterr().out.splitlines()
    assert f"{node} {line}" in told
    assert told[-1] == f"{len(WRITTEN & held)}/3 writes are in all three"


@pytest.mark.parametrize(("is_whole", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_is_the_verdict(
    monkeypatch: pytest.MonkeyPatch, is_whole: bool, code: int
) -> None:
    monkeypatch.setattr(three_nodes, "find_etcd", lambda: Path("/bin/false"))
    monkeypatch.setattr(three_nodes, "run", lambda *_: is_whole)
    assert three_nodes.main([]) == code


def test_without_an_etcd_one_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide_etcds(monkeypatch)
    assert three_nodes.main([]) == 1
    assert "raft-pipeline[demo]" in capsys.readouterr().err


def test_without_trustme_one_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(three_nodes, "find_etcd", lambda: Path("/bin/false"))
    monkeypatch.setitem(sys.modules, "trustme", None)
    assert three_nodes.main([]) == 1
    assert "raft-pipeline[demo]" in capsys.readouterr().err


def test_a_free_port_is_handed_out_once() -> None:
    """Nobody listens yet on those before, and two members of one cluster need two."""
    ports = [free_port() for _ in range(1000)]
    assert len(set(ports)) == len(ports)


def test_a_free_port_is_no_other_process_s() -> None:
    """Which may not have begun to listen: tests run side by side."""
    program = (
        "from pipeline.examples.etcd import free_port; import sys\n"
        "print([free_port() for _ in range(1000)], flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        theirs = json.loads(process.stdout.readline())
        ours = [free_port() for _ in range(3000)]
        process.stdin.close()
    assert len(theirs) == 1000
    assert not set(theirs) & set(ours)


@has_trustme
def test_an_etcd_that_does_not_start_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(tmp_path / "temporary"))
    assert three_nodes.main(["--etcd", os.fspath(make_pretender(tmp_path))]) == 1
    assert "etcd ended instead of starting" in capsys.readouterr().err
    assert_nothing_is_left(tmp_path / "temporary")


@has_trustme
@pytest.mark.parametrize("binary", ["/bin/false", "/nowhere/etcd"])
def test_what_is_no_etcd_is_told(binary: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert three_nodes.main(["--etcd", binary]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(binary)


def test_the_etcd_that_the_environment_names_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    binary = make_pretender(tmp_path)
    monkeypatch.setenv("PIPELINE_ETCD", os.fspath(binary))
    assert find_etcd() == binary
    binary.chmod(0o600)
    assert three_nodes.main([]) == 1
    assert capsys.readouterr().err == f"PIPELINE_ETCD={binary}: not an executable file\n"


@pytest.mark.parametrize(
    ("version", "claim"),
    [("3.4.23", "3.4.0"), ("3.6.16", "3.6.0"), ("3.7.0-rc.1", "3.7.0"), ("4.10.2", "4.10.0")],
)
def test_we_claim_the_minor_version_of_the_etcd_beside_us(version: str, claim: str) -> None:
    config = TransportConfig(queue_bytes=7)
    assert config_beside(version, config) == replace(config, server_version=claim)


@pytest.mark.parametrize("value", [b"", b"value", bytes(200), bytes(70_000)], ids=len)
def test_a_put_that_we_propose_is_read_as_one(value: bytes) -> None:
    entry = Entry(term=1, index=1, data=put_request(b"key", value))
    assert put_of(entry) == (b"key", value)


def test_a_database_whose_bucket_is_inside_its_parent_is_read(tmp_path: Path) -> None:
    """As bbolt writes a small one."""

    def leaf(key: bytes, value: bytes) -> bytes:
        header = struct.pack("<QHHI", 0, 2, 1, 0)
        return header + struct.pack("<IIII", 0, 16, len(key), len(value)) + key + value

    put = b"\x0a\x01k\x10\x02\x18\x02\x20\x01\x2a\x01v"  # KeyValue(k, 2, 2, 1, v)
    bucket = struct.pack("<QQ", 0, 0) + leaf(bytes(17), put)
    meta = struct.pack("<QHHI", 0, 4, 0, 0) + struct.pack("<IIIIQQ", 0xED0CDAED, 2, 4096, 0, 1, 0)
    database = tmp_path / "db"
    database.write_bytes(meta.ljust(4096, b"\0") + leaf(b"key", bucket))
    assert puts_in(database) == {(b"k", b"v")}
