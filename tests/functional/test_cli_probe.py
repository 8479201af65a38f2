"""``raft-pipeline probe``: a person with a sick peer gets to the reason in one command."""

from __future__ import annotations

import errno
import json
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pipeline import TLSInfo, Transport, TransportConfig, reasons
from pipeline.cli.commands import commands
from pipeline.reasons import explanation_of
from tests.support.processes import ROOT, TIMEOUT_S
from tests.support.raft import FakeRaft
from tests.support.server import (
    PROBED,
    Connection,
    Request,
    ScriptedServer,
    always,
    answer,
    black_hole,
    refused_port,
    then_close,
)
from tests.support.tls import DAY, Authority, now

CLUSTER = 0x7E57

#: Nodes have streams here, as they have by default.
pytestmark = pytest.mark.streams


def not_found(connection: Connection, head: bytes) -> bool:
    """Answer any request as something that is no peer; ``on_head`` of a server."""
    connection.send(answer("404 Not Found", b"404 page not found\n"))
    return False


class Clinic:
    """Peers, sick in one way each, and what is used to look at them."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.stack = stack
        self.directory = directory
        self.authority = Authority(directory / "ours")
        self.files = self.options(self.authority, *self.authority.issue("node"))

    @staticmethod
    def options(authority: Authority, cert: Path, key: Path) -> list[str]:
        return ["--cert", str(cert), "--key", str(key), "--cacert", str(authority.ca_file)]

    def node(
        self,
        *,
        tls: TLSInfo | None = None,
        raft: FakeRaft | None = None,
        **settings: Any,
    ) -> str:
        """Start a node of ours, of CLUSTER; where it listens."""
        config = TransportConfig(**settings)
        node = Transport(2, CLUSTER, raft or FakeRaft(), tls=tls, config=config)
        self.stack.enter_context(node)
        return node.listen(f"{'https' if tls else 'http'}://127.0.0.1:0").url

    def secure_node(self) -> str:
        return self.node(tls=self.authority.info("peer"))

    def server(self, **settings: Any) -> str:
        server = ScriptedServer(on_head=not_found, **settings)
        return self.stack.enter_context(server).url

    def young_server(self) -> ssl.SSLContext:
        """Return what a server works with whose certificate is not valid before tomorrow."""
        issued = self.authority.ca.issue_cert(
            "127.0.0.1", not_before=now() + DAY, not_after=now() + 2 * DAY
        )
        path = self.directory / "young.pem"
        issued.private_key_and_cert_chain_pem.write_to_path(path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context


@pytest.fixture
def clinic(tmp_path: Path) -> Iterator[Clinic]:
    with ExitStack() as stack:
        yield Clinic(tmp_path, stack)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(commands, ["probe", *arguments])


def diagnosis(*arguments: str) -> dict[str, Any]:
    """Probe; the JSON, and that the exit code is the one in it."""
    result = run("--json", "--count", "2", *arguments)
    found: dict[str, Any] = json.loads(result.output)
    assert result.exit_code == found["exit_code"]
    return found


def assert_sick(found: dict[str, Any], verdict: str, exit_code: int) -> None:
    assert (found["verdict"], found["exit_code"]) == (verdict, exit_code), found
    assert found["reason"]
    assert found["advice"]
    assert found["line"] == f"{found['url']}: {verdict}: {found['meaning']} ({found['reason']})"


def test_a_healthy_peer_is_told_with_version_cluster_and_round_trips(clinic: Clinic) -> None:
    found = diagnosis(clinic.node(), "--cluster-id", f"{CLUSTER:x}")
    assert (found["verdict"], found["exit_code"], found["reason"]) == ("ok", 0, "")
    assert (found["version"], found["cluster_id"]) == ("3.5.0", f"{CLUSTER:x}")
    assert found["round_trips"] == 2
    assert 0 < found["rtt_p50_ms"] <= found["rtt_p99_ms"]
    assert found["dial_ms"] > 0
    assert found["tls"] is found["certificate"] is None


def test_the_cluster_need_not_be_known(clinic: Clinic) -> None:
    found = diagnosis(clinic.node())
    assert (found["verdict"], found["cluster_id"]) == ("ok", f"{CLUSTER:x}")


def test_over_tls_it_says_who_the_peer_is_and_until_when(clinic: Clinic) -> None:
    found = diagnosis(clinic.secure_node(), *clinic.files)
    assert (found["verdict"], found["tls"]) == ("ok", "TLSv1.3")
    assert found["certificate"]["names"] == ["IP Address:127.0.0.1"]
    assert found["expires_in_days"] > 7
    assert found["ours_expires_in_days"] > 7
    assert found["notes"] == []


def test_a_certificate_that_expires_soon_is_noted(clinic: Clinic) -> None:
    cert, key = clinic.authority.issue("soon", not_after=now() + DAY)
    info = clinic.authority.info(cert_file=cert, key_file=key)
    found = diagnosis(clinic.node(tls=info), *clinic.files)
    assert found["verdict"] == "ok"
    assert re.fullmatch(r"the peer's certificate expires in 1\.0 days", found["notes"][0])


def test_a_peer_is_left_as_it_was(clinic: Clinic) -> None:
    raft = FakeRaft()
    node = Transport(2, CLUSTER, raft)
    clinic.stack.enter_context(node)
    node.add_peer(3, ["http://127.0.0.1:1"])
    url = node.listen("http://127.0.0.1:0").url
    found = diagnosis(url, "--as-member", "3", "--cluster-id", f"{CLUSTER:x}")
    assert found["verdict"] == "ok"
    assert [stream.since for stream in node.peer_stats()[3].streams] == [None] * 4
    assert (raft.processed, node.transport_stats().received_failures) == ([], 0)


def test_a_connection_that_the_peer_does_not_keep_is_made_anew(clinic: Clinic) -> None:
    with ScriptedServer(on_head=not_found) as server:
        server.on_probe = then_close(PROBED)
        found = diagnosis(server.url, "--count", "3")
        # It knows nothing of versions and streams, but it is there.
        assert found["round_trips"] == 0
        assert len(server.probes) == 1
        assert found["is_reachable"] is True
        assert_sick(found, "odd-status", 5)


# -- twelve sick peers


def test_a_connection_that_is_refused_is_told() -> None:
    with refused_port() as port:
        found = diagnosis(f"http://127.0.0.1:{port}")
    assert_sick(found, "refused", 3)
    assert found["is_reachable"] is False


def test_a_black_hole_is_told_from_a_refusal() -> None:
    with black_hole() as port:
        found = diagnosis(f"http://127.0.0.1:{port}", "--timeout", "0.05")
    assert_sick(found, "black-hole", 3)


def test_a_peer_that_takes_connections_and_says_nothing_is_told(clinic: Clinic) -> None:
    def say_nothing(connection: Connection, request: Request) -> None:
        pass

    with ScriptedServer() as server:
        server.on_probe = say_nothing
        found = diagnosis(server.url, "--timeout", "0.05")
    assert_sick(found, "silent", 3)
    assert found["is_reachable"] is True


def test_the_wrong_port_is_told() -> None:
    with ScriptedServer(on_head=not_found) as server:
        server.on_probe = always(answer("404 Not Found", b"404 page not found\n"))
        found = diagnosis(server.url)
    assert_sick(found, "not-a-peer", 5)


def test_a_port_where_another_protocol_is_spoken_is_told() -> None:
    with ScriptedServer() as server:
        server.on_probe = always(b"-ERR unknown command 'GET'\r\n")
        found = diagnosis(server.url)
    assert_sick(found, "not-a-peer", 5)


def test_http_where_tls_is_spoken_is_told(clinic: Clinic) -> None:
    found = diagnosis(clinic.secure_node().replace("https:", "http:"))
    assert_sick(found, "needs-tls", 4)


def test_https_where_no_tls_is_spoken_is_told(clinic: Clinic) -> None:
    found = diagnosis(clinic.node().replace("http:", "https:"), *clinic.files)
    assert_sick(found, "no-tls", 4)
    assert found["is_reachable"] is True


def test_an_expired_certificate_is_told(clinic: Clinic) -> None:
    server = clinic.authority.server("old", not_after=now() - DAY)
    url = clinic.server(tls=server)
    found = diagnosis(url, *clinic.files)
    assert_sick(found, "expired", 4)
    assert found["expires_in_days"] == pytest.approx(-1, abs=0.1)
    until = ssl.cert_time_to_seconds(found["certificate"]["not_after"])
    assert until == pytest.approx((now() - DAY).timestamp(), abs=120)
    shown = run(url, *clinic.files).output
    assert f"{found['certificate']['not_after']} ({-found['expires_in_days']} days ago)" in shown


def test_our_own_expired_certificate_is_told_from_the_peer_s(clinic: Clinic) -> None:
    files = clinic.authority.issue("old", not_after=now() - DAY)
    found = diagnosis(clinic.secure_node(), *clinic.options(clinic.authority, *files))
    assert_sick(found, "ours-expired", 4)
    assert found["notes"] == ["our own certificate has expired"]


def test_a_certificate_that_is_not_valid_yet_is_told(clinic: Clinic) -> None:
    found = diagnosis(clinic.server(tls=clinic.young_server()), *clinic.files)
    assert_sick(found, "not-yet-valid", 4)
    begin = ssl.cert_time_to_seconds(found["certificate"]["not_before"])
    assert begin > now().timestamp()


def test_a_certificate_of_another_authority_is_told(clinic: Clinic) -> None:
    other = Authority(clinic.directory / "theirs")
    found = diagnosis(clinic.node(tls=other.info()), *clinic.files)
    assert_sick(found, "wrong-ca", 4)
    assert found["certificate"] is None  # what a stranger says of itself proves nothing


def test_a_peer_that_does_not_trust_our_authority_is_told(clinic: Clinic) -> None:
    other = Authority(clinic.directory / "theirs")
    cert, key = other.issue("stranger")
    found = diagnosis(clinic.secure_node(), *clinic.options(clinic.authority, cert, key))
    assert_sick(found, "ours-refused", 4)


def test_a_certificate_for_another_name_is_told(clinic: Clinic) -> None:
    url = clinic.server(tls=clinic.authority.server("elsewhere", "node-2.example"))
    found = diagnosis(url, *clinic.files)
    assert_sick(found, "wrong-name", 4)
    assert found["certificate"]["names"] == ["DNS:node-2.example"]
    server_name = ["--server-name", "node-2.example"]
    assert diagnosis(url, *clinic.files, *server_name)["certificate"]["names"] == [
        "DNS:node-2.example"
    ]


@pytest.mark.parametrize("streams", [True, False])
def test_another_cluster_is_told_and_which_it_is(clinic: Clinic, streams: bool) -> None:
    found = diagnosis(clinic.node(streams=streams), "--cluster-id", "8")
    assert_sick(found, "wrong-cluster", 6)
    assert found["cluster_id"] == f"{CLUSTER:x}"
    assert f"the peer is of {CLUSTER:x}, not of 8" in found["reason"]


@pytest.mark.parametrize("streams", [True, False])
def test_another_version_is_told_and_which_it_is(clinic: Clinic, streams: bool) -> None:
    url = clinic.node(server_version="3.6.0", min_cluster_version="3.6.0", streams=streams)
    found = diagnosis(url)
    assert_sick(found, "wrong-version", 6)
    assert "the peer has 3.6.0, and 3.5.0 was claimed" in found["reason"]
    assert diagnosis(url, "--server-version", "3.6.0")["verdict"] == "ok"


def test_a_member_that_was_removed_is_told_from_one_that_is_not_known(clinic: Clinic) -> None:
    raft = FakeRaft()
    raft.removed.add(9)
    url = clinic.node(raft=raft)
    assert_sick(diagnosis(url, "--as-member", "9"), "removed", 7)
    assert_sick(diagnosis(url, "--as-member", "a"), "unknown-member", 6)


# -- and the rest


def test_the_last_line_is_the_verdict_and_the_one_before_what_to_do() -> None:
    with refused_port() as port:
        result = run(f"http://127.0.0.1:{port}")
    *_, advice, verdict = result.output.splitlines()
    assert advice.startswith("what to do: see whether the peer runs")
    assert verdict.startswith(f"http://127.0.0.1:{port}: refused: the machine is there")
    assert verdict.endswith(": Connection refused)")
    assert result.exit_code == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["http://127.0.0.1"],
        ["https://127.0.0.1:1"],
        ["http://127.0.0.1:1", "--cluster-id", "cluster"],
        ["http://127.0.0.1:1", "--server-version", "three"],
    ],
)
def test_a_wrong_command_line_is_told_apart_from_a_sick_peer(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.output.startswith("Usage: ")


def reasons_of_the_documents() -> list[str]:
    text = (ROOT / "docs" / "operations.md").read_text()
    listed = re.search(r"^Reasons: .*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
    assert listed is not None
    found = re.findall(r"`([^`]+)`", " ".join(listed[0].split()))
    assert len(found) > 10
    return found


@pytest.mark.parametrize("reason", reasons_of_the_documents())
def test_every_reason_of_the_documents_is_explained(reason: str) -> None:
    result = CliRunner().invoke(commands, ["explain", "--json", reason])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["verdict"] == explanation_of(reason).verdict != "failed"


def reasons_of_the_loops() -> list[str]:
    """The texts that the compiled modules have for how a connection ended."""
    found = []
    for path in ("_core.pyx", "stream/_streams.pyx"):
        text = (ROOT / "pipeline" / path).read_text()
        (table,) = re.findall(r"^cdef dict REASONS = \{(.*?)^\}", text, re.MULTILINE | re.DOTALL)
        found += re.findall(r'"([^"]+)"', table)
    return [*found, "EOF", *map(os.strerror, (errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT))]


@pytest.mark.parametrize("reason", reasons_of_the_loops())
def test_however_a_connection_ends_is_explained(reason: str) -> None:
    assert explanation_of(reason).verdict != "failed"


def test_the_verdicts_of_operations_md_are_those_of_explain() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    known = dict.fromkeys(explanation for _, explanation in reasons._KNOWN)
    assert [row for row in rows if row[0] in {it.verdict for it in known} | {"failed"}] == [
        (it.verdict, it.meaning, it.advice) for it in (*known, reasons._UNKNOWN)
    ]


def test_a_reason_that_is_not_known_is_not_explained_away() -> None:
    result = CliRunner().invoke(commands, ["explain"], input="the moon is full\n")
    assert result.exit_code == 1
    assert result.output.startswith("failed: ")


def test_every_verdict_has_one_exit_code() -> None:
    codes: dict[str, set[int]] = {}
    for _, explanation in reasons._KNOWN:
        codes.setdefault(explanation.verdict, set()).add(explanation.exit_code)
    assert all(len(found) == 1 for found in codes.values())
    assert not {0, 2} & set.union(*codes.values())


def test_the_module_is_the_command() -> None:
    with refused_port() as port:
        result = subprocess.run(
            [sys.executable, "-m", "pipeline", "probe", f"http://127.0.0.1:{port}"],
            check=False,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    assert (result.returncode, result.stderr) == (3, "")
    assert ": refused: " in result.stdout


@pytest.mark.parametrize(
    ("words", "completed"),
    [("raft-pipeline pro", "plain,probe\n"), ("raft-pipeline decode --str", "plain,--stream\n")],
)
def test_the_shell_is_told_what_completes_a_word(words: str, completed: str) -> None:
    completion = {
        "_RAFT_PIPELINE_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    result = subprocess.run(
        [Path(sys.executable).with_name("raft-pipeline")],
        check=True,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, **completion},
    )
    assert result.stdout == completed


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_shells_complete_the_commands(shell: str) -> None:
    result = CliRunner().invoke(commands, ["completion", shell])
    assert result.exit_code == 0
    assert "_RAFT_PIPELINE_COMPLETE" in result.output
