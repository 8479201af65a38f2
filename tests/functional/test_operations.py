"""Dashboard, alerts and ``metrics_node``: what they ask for exists, and the right alert fires."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import urllib3
from prometheus_client import (
    CollectorRegistry,
    ProcessCollector,
    generate_latest,
    start_http_server,
)
from prometheus_client.parser import text_string_to_metric_families

from pipeline import Inbox, ReceiverConfig, Transport, TransportConfig, reasons
from pipeline.examples.certificates import Certificates
from pipeline.examples.etcd import free_port
from pipeline.metrics import MetricsCollector
from pipeline.receive.received import REFUSALS
from tests.support import LONG_TIMEOUT
from tests.support.processes import TIMEOUT_S, Program
from tests.support.raft import FakeRaft
from tests.support.senders import message
from tests.support.server import refused_port
from tests.support.snapshots import snapshot
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]
OPERATIONS = ROOT / "operations"
ALERTS = (OPERATIONS / "alerts.yml").read_text()
#: What Prometheus adds to each sample, or makes itself.
ADDED = {"instance", "job"}
PROMETHEUS_OWN = {"ALERTS": {"alertname", "alertstate", "severity", "Local", "To"}}

pytestmark = pytest.mark.skipif(
    not (ROOT / "pipeline").is_dir(), reason="the package's sources are not beside the tests"
)


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name}: Debian's package prometheus has it")
    return path


@functools.cache
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((OPERATIONS / "dashboard.json").read_text())
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def rules() -> dict[str, str]:
    """The expression of each alert, by its name."""
    found = re.findall(
        r"- alert: (\w+)\n +expr:(?: >-)?(.*?)\n +(?:for|labels):", ALERTS, re.DOTALL
    )
    return {name: " ".join(expr.split()) for name, expr in found}


def asked_for(expr: str) -> dict[str, set[str]]:
    """The names in an expression, with the labels that it asks for by each."""
    found: dict[str, set[str]] = {}
    by = {
        label
        for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", expr)
        for label in re.split(r"\W+", labels)
        if label
    }
    made = set(re.findall(r'label_replace\(.*?, "(\w+)"', expr))
    for name, labels in re.findall(r"\b([a-zA-Z]\w*_\w+|ALERTS)\b(?!\s*\()(?:\{([^}]*)\})?", expr):
        if name in by or name in ("group_left", "group_right", "__rate_interval"):
            continue
        found.setdefault(name, set()).update(re.findall(r"(\w+)\s*[=!]", labels))
    return {name: labels | by - made - {"le"} for name, labels in found.items()}


def test_what_an_expression_asks_for_is_found_in_it() -> None:
    expr = (
        'sum by (le, To) (rate(a_total{To=~"b|c", x!="y_z"}[5m])) / b_bytes > 0 '
        'and on (Local) label_replace(c_peers == 1, "Local", "$1", "Remote", "(.*)")'
    )
    assert asked_for(expr) == {"a_total": {"To", "x"}, "b_bytes": {"To"}, "c_peers": {"To"}}


class Nodes:
    """Two nodes that have everything there is to count, and a peer that is away."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        certificates = Certificates(directory)
        self.inbox = Inbox()
        self.away = stack.enter_context(refused_port())
        self.nodes = tuple(
            stack.enter_context(
                Transport(
                    member_id,
                    7,
                    FakeRaft(),
                    tls=certificates.issue(f"{member_id}", days=30),
                    inbox=self.inbox if member_id == 1 else None,
                    config=TransportConfig(
                        receiver=ReceiverConfig(snapshot_dir=directory / f"snap{member_id}"),
                        probe_interval_s=0.05,
                        streams=True,
                    ),
                )
            )
            for member_id in (1, 2)
        )
        one, two = self.nodes
        urls = [node.listen("https://127.0.0.1:0").url for node in self.nodes]
        for node, other, url in ((one, 2, urls[1]), (two, 1, urls[0])):
            node.add_peer(other, [url])
            node.add_peer(3, [f"https://127.0.0.1:{self.away}"])
        one.send_snapshot(snapshot(), b"database").result(LONG_TIMEOUT)
        two.send([message(to=1)])
        for node in self.nodes:
            node.send([message(to=3)])
            eventually(partial(self.is_known, node))
        self.registry = CollectorRegistry()
        self.registry.register(MetricsCollector(self.nodes))
        ProcessCollector(registry=self.registry)

    def is_known(self, node: Transport) -> bool:
        """Whether it knows whether each peer answers, and has failed to reach the one away."""
        probed = all(stats.total for stats in node.probe_stats().values())
        return probed and node.peer_stats()[3].last_error is not None

    def exposed(self) -> dict[str, set[str]]:
        """Return the names of their samples, each with its labels."""
        found: dict[str, set[str]] = {}
        text = generate_latest(self.registry).decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
        return found


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with ExitStack() as stack:
        yield Nodes(tmp_path, stack)


@pytest.mark.streams
def test_dashboard_and_alerts_ask_for_nothing_that_nodes_do_not_expose(nodes: Nodes) -> None:
    exposed = nodes.exposed() | PROMETHEUS_OWN
    for expr in (*queries(), *rules().values()):
        asked = asked_for(expr)
        assert asked, expr
        for name, labels in asked.items():
            assert name in exposed, expr
            assert labels <= exposed[name] | ADDED, (expr, name)
    names = {name for expr in (*queries(), *rules().values()) for name in asked_for(expr)}
    left_out = {
        *("raft_pipeline_offered_messages_total", "raft_pipeline_accepted_messages_total"),
        *("raft_pipeline_queued_messages", "raft_pipeline_queued_bytes"),  # by channel
        *("raft_pipeline_stream_messages_total", "raft_pipeline_stream_ignored_messages_total"),
        *(
            "raft_pipeline_inbox_received_messages_total",
            "raft_pipeline_inbox_taken_messages_total",
        ),
        *("raft_pipeline_inbox_queued_bytes", "raft_pipeline_listener_accepted_connections_total"),
    }
    ours = {name for name in exposed if name.startswith("raft_pipeline")}
    assert ours - names == left_out


def test_the_verdicts_that_an_alert_is_for_are_verdicts() -> None:
    known = {explanation.verdict for _, explanation in reasons._KNOWN}
    named = re.findall(r'Verdict=~"([^"]+)"', ALERTS)
    assert len(named) >= 2
    assert {verdict for text in named for verdict in text.split("|")} <= known
    ours = {"undecodable", "incomplete", "too-large", "no-memory", "encoded", "busy", "forked"}
    assert set(REFUSALS) - known == ours


def test_the_verdicts_that_time_does_not_heal_have_an_alert() -> None:
    """Those that are of TLS, and those for which ``probe`` ends with "does not fit"."""
    lasting = {
        explanation.verdict
        for _, explanation in reasons._KNOWN
        if explanation.exit_code in (reasons.EXIT_TLS, reasons.EXIT_MISMATCH, reasons.EXIT_REMOVED)
    }
    named = {
        verdict for text in re.findall(r'Verdict=~"([^"]+)"', ALERTS) for verdict in text.split("|")
    }
    assert named == lasting - {"no-streams"}


def test_every_alert_is_tested_and_leads_to_a_section() -> None:
    names = list(rules())
    assert len(names) == ALERTS.count("- alert:") > 15
    tested = re.findall(r"alertname: (\w+)", (OPERATIONS / "alerts_test.yml").read_text())
    assert set(tested) == set(names)
    page = (ROOT / "docs" / "operations.md").read_text()
    sections = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-"): title
        for title in re.findall(r"^###? (.*)$", page, re.MULTILINE)
    }
    for rule in ALERTS.split("- alert: ")[1:]:
        (anchor,) = re.findall(r"runbook_url: docs/operations\.md#(\S+)", rule)
        section = page.partition(f" {sections[anchor]}\n")[2].partition("\n##")[0]
        assert f"`{rule.split()[0]}`" in section, rule


def test_the_dashboard_is_what_its_program_writes() -> None:
    found = importlib.util.spec_from_file_location("dashboard", OPERATIONS / "dashboard.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    assert module.dashboard() == dashboard()


def test_the_panels_cover_the_page_and_not_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        place = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not place & taken
        taken |= place
    for panel in panels():
        assert panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"]


def test_the_alerts_fire_when_they_are_to() -> None:
    promtool = program("promtool")
    for arguments in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        result = subprocess.run(
            [promtool, *arguments],
            cwd=OPERATIONS,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
        assert result.returncode == 0, result.stdout + result.stderr


def metrics_nodes(directory: Path, stack: ExitStack, *members: int) -> dict[int, Program]:
    """Start some of three members; where each is scraped is in its first line."""
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(3)]
    return {
        member: stack.enter_context(
            Program(
                "pipeline.examples.metrics_node",
                str(member),
                str(directory / f"{member}.log"),
                "0",
                *urls,
            )
        )
        for member in members
    }


def address_of(node: Program) -> str:
    return node.wait_line(r"metrics: http://(\S+)/metrics")[1]


def test_the_node_with_metrics_shows_its_peers_and_its_process(tmp_path: Path) -> None:
    with ExitStack() as stack:
        programs = metrics_nodes(tmp_path, stack, 1, 2)
        url = f"http://{address_of(programs[1])}/metrics"
        seen: dict[tuple[str, str], float] = {}

        def is_there() -> bool:
            answer = urllib3.request("GET", url, timeout=TIMEOUT_S)
            seen.clear()
            for family in text_string_to_metric_families(answer.data.decode()):
                for sample in family.samples:
                    peer = sample.labels.get("To") or sample.labels.get("Remote", "")
                    key = sample.labels.get("Verdict", sample.name)
                    seen[key, peer] = seen.get((key, peer), 0.0) + sample.value
            return (
                seen.get(("etcd_network_active_peers", "2")) == 1
                and seen.get(("etcd_network_active_peers", "3")) == 0
                and seen.get(("refused", "3"), 0) > 0
                and seen.get(("raft_pipeline_channel_sent_messages_total", "2"), 0) > 0
            )

        eventually(is_there, lambda: seen)
        assert seen["process_cpu_seconds_total", ""] > 0
        assert programs[1].terminate() == 0


class Prometheus:
    """A Prometheus of its own, with the alerts of ``operations/`` that wait for nothing."""

    def __init__(self, binary: str, directory: Path, targets: list[str], stack: ExitStack) -> None:
        alerts = re.sub(r"for: \w+", "for: 0s", ALERTS)
        (directory / "alerts.yml").write_text(alerts)
        (directory / "prometheus.yml").write_text(
            "global: {scrape_interval: 500ms, evaluation_interval: 500ms}\n"
            "rule_files: [alerts.yml]\n"
            "scrape_configs:\n"
            f"  - {{job_name: raft, static_configs: [{{targets: {json.dumps(targets)}}}]}}\n"
        )
        self.url = f"http://127.0.0.1:{free_port()}"
        log = stack.enter_context((directory / "prometheus.log").open("w"))
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={directory}/prometheus.yml",
                f"--storage.tsdb.path={directory}/data",
                f"--web.listen-address={self.url.removeprefix('http://')}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        stack.callback(process.wait, TIMEOUT_S)
        stack.callback(process.kill)
        eventually(self.is_ready)

    def is_ready(self) -> bool:
        try:
            answer = urllib3.request("GET", f"{self.url}/-/ready", retries=False)
        except urllib3.exceptions.HTTPError:
            return False
        return answer.status == 200

    def query(self, expr: str) -> list[dict[str, Any]]:
        answer = urllib3.request("GET", f"{self.url}/api/v1/query", fields={"query": expr})
        said = answer.json()
        assert said["status"] == "success", (expr, said)
        found: list[dict[str, Any]] = said["data"]["result"]
        return found

    def firing(self) -> set[tuple[str, str]]:
        """Return the alerts that fire, each with the peer that it is about."""
        labels = [found["metric"] for found in self.query('ALERTS{alertstate="firing"}')]
        return {(it["alertname"], it.get("To") or it.get("Remote", "")) for it in labels}


@pytest.mark.streams
def test_a_prometheus_has_data_for_every_panel_and_fires_for_the_peer_that_is_sick(
    nodes: Nodes, tmp_path: Path
) -> None:
    binary = program("prometheus")
    with ExitStack() as stack:
        programs = metrics_nodes(tmp_path, stack, 1, 2, 3)
        server, thread = start_http_server(0, "127.0.0.1", registry=nodes.registry)
        stack.callback(server.server_close)
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        targets = [f"127.0.0.1:{server.server_port}", *map(address_of, programs.values())]
        prometheus = Prometheus(binary, tmp_path, targets, stack)
        one = targets[1]
        active = f'etcd_network_active_peers{{instance="{one}"}}'
        eventually(lambda: len(prometheus.query(f"{active} == 1")) == 2)

        programs[3].process.send_signal(signal.SIGSTOP)  # killed at the end all the same
        told: list[dict[str, Any]] = []

        def is_told() -> bool:
            answer = urllib3.request("GET", f"{prometheus.url}/api/v1/alerts").json()
            told[:] = [
                alert
                for alert in answer["data"]["alerts"]
                if alert["labels"].get("instance") == one and alert["state"] == "firing"
            ]
            return any(alert["labels"]["alertname"] == "RaftPeerDown" for alert in told)

        eventually(is_told, lambda: told)
        (down,) = [it for it in told if it["labels"]["alertname"] == "RaftPeerDown"]
        assert down["labels"]["Remote"] == "3"
        verdict = down["annotations"]["description"].removeprefix("Last failure: ")
        assert verdict in ("silent", "dead-link", "stalled"), down

        empty: list[str] = []

        def has_data() -> bool:
            filled = (
                expr.replace("$instance", ".*")
                .replace("$peer", ".*")
                .replace("$__rate_interval", "1m")
                for expr in queries()
            )
            empty[:] = [expr for expr in filled if not prometheus.query(expr)]
            return not empty

        eventually(has_data, lambda: empty)
