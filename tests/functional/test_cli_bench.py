"""``raft-pipeline bench``: every message of a load is accounted for, and none reaches the raft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipeline import Transport, TransportConfig
from pipeline.cli.bench import histogram, sparkline
from pipeline.cli.commands import commands
from tests.support.raft import FakeRaft
from tests.support.server import Connection, Request, ScriptedServer, answer, refused_port
from tests.support.tls import Authority

pytestmark = pytest.mark.streams

#: Reached only if messages do not get through.
SECONDS = ["--seconds", "60"]


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(commands, ["bench", *SECONDS, *arguments])


@pytest.mark.parametrize("is_tls", [False, True])
def test_a_load_arrives_whole_and_is_not_given_to_the_raft(is_tls: bool, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    cert, key = map(str, authority.issue("bench"))
    files = ["--cert", cert, "--key", key, "--cacert", str(authority.ca_file)] if is_tls else []
    raft = FakeRaft()
    with Transport(2, 7, raft, tls=authority.info() if is_tls else None) as node:
        url = node.listen(f"{'https' if is_tls else 'http'}://127.0.0.1:0").url
        result = bench(url, *files, "--messages", "1000", "--size", "100", "--json")
        assert result.exit_code == 0, result.output
        found = json.loads(result.output)
        assert found["books"]["accepted"] == found["books"]["sent"] == 1000
        assert node.transport_stats().ignored == 1000
    assert raft.processed == []
    assert found["message_bytes"] > 100
    assert found["messages_per_s"] == pytest.approx(1000 / found["seconds"], rel=0.01)
    assert found["cpu_us_per_message"] > 0


def test_messages_that_fail_are_counted_and_explained() -> None:
    refusal = answer("500 Internal Server Error", b"error processing raft message\n")

    def refuse(connection: Connection, request: Request) -> bytes:
        return refusal

    def other(connection: Connection, head: bytes) -> bool:
        if head.startswith(b"POST"):
            return True
        # Not a node that takes streams, and one that says no version.
        connection.send(answer("404 Not Found"))
        return False

    with ScriptedServer(on_head=other) as server:
        seen: list[int] = []

        def script(connection: Connection, request: Request) -> bytes:
            seen.append(1)  # the first one is the question of whether there is a peer
            return answer("204 No Content") if len(seen) == 1 else refuse(connection, request)

        server.script = script
        result = bench(server.url, "--messages", "3", "--cluster-id", "1")
    assert result.exit_code == 1
    assert "3 failed, the last one: unexpected http status Internal Server Error" in result.output
    assert "cannot-process: " in result.output


def test_with_a_sick_peer_it_ends_as_probe_does() -> None:
    with refused_port() as port:
        result = bench(f"http://127.0.0.1:{port}", "--json")
    assert result.exit_code == 3
    assert json.loads(result.output)["verdict"] == "refused"


def test_people_get_plots() -> None:
    with Transport(2, 7, FakeRaft(), config=TransportConfig(streams=False)) as node:
        url = node.listen("http://127.0.0.1:0").url
        result = CliRunner().invoke(commands, ["bench", url, "--seconds", "0.3"])
    assert result.exit_code == 0, result.output
    assert "messages a second, 0 to " in result.output
    assert "round trips beside it: p50 " in result.output
    assert "█" in result.output


def test_a_line_and_bars_are_drawn_to_scale() -> None:
    assert sparkline([0.0, 1.0, 2.0, 4.0]) == "▁▃▅█"
    assert len(sparkline([1.0] * 1000)) <= 60
    assert sparkline([0.0]) == "▁"
    low, empty, high = histogram([0.001, 0.001, 0.004])
    assert low.split() == ["0.977", "ms", "2", "█" * 60]
    assert empty.split() == ["1.953", "ms", "0"]
    assert high.split() == ["3.906", "ms", "1", "█" * 30]
