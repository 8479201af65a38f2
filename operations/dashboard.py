"""Writes ``dashboard.json``, for Grafana 10 and later: ``python operations/dashboard.py``.

What is written is generated because JSON repeats itself: here stands what is asked, and why. A
panel is a title, what it tells, and queries with their legends. The rows go from what is seen
first, a peer that is sick, to what is looked at last.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
#: Of a page of 24.
WIDTH, HEIGHT = 8, 8

NODE = 'instance=~"$instance"'
#: Whatever names the peer with To.
TO = f'{NODE}, To=~"$peer"'
REMOTE = f'{NODE}, Remote=~"$peer"'
BY = "by (instance, Local, To)"
WAY = "{{Local}} → {{To}}"

Query = tuple[str, str]
Panel = dict[str, Any]


def rate(name: str, labels: str, by: str = BY) -> str:
    return f"sum {by} (rate({name}{{{labels}}}[$__rate_interval]))"


def quantile(q: float, name: str, labels: str, by: str) -> str:
    buckets = f"rate({name}_bucket{{{labels}}}[$__rate_interval])"
    return f"histogram_quantile({q}, sum by (le, instance{by}) ({buckets}))"


def panel(
    title: str,
    tells: str,
    *queries: Query,
    unit: str = "short",
    kind: str = "timeseries",
    most: float | None = None,
    width: int = WIDTH,
    **options: Any,
) -> Panel:
    """Return a panel; the page says where it is."""
    defaults: dict[str, Any] = {"unit": unit}
    if most is not None:
        defaults["max"] = most
    if kind == "timeseries":
        if unit != "d":  # what has expired is below
            defaults["min"] = 0
        defaults["custom"] = {"fillOpacity": 10, "showPoints": "never"}
        options.setdefault("tooltip", {"mode": "multi", "sort": "desc"})
        options.setdefault("legend", {"displayMode": "list", "placement": "bottom"})
    return {
        "type": kind,
        "title": title,
        "description": tells,
        "datasource": DATASOURCE,
        "gridPos": {"h": HEIGHT, "w": width, "x": 0, "y": 0},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": DATASOURCE,
                "expr": expr,
                "legendFormat": legend,
                **({"format": "table", "instant": True} if kind == "table" else {}),
            }
            for i, (expr, legend) in enumerate(queries)
        ],
    }


def table(title: str, tells: str, expr: str, columns: dict[str, str], **more: Any) -> Panel:
    """Return a table of what an expression has now, with these of its labels."""
    made = panel(title, tells, (expr, ""), kind="table", width=12, **more)
    made["transformations"] = [
        {
            "id": "organize",
            "options": {
                "includeByName": dict.fromkeys(columns, True),
                "indexByName": {name: i for i, name in enumerate(columns)},
                "renameByName": columns,
            },
        }
    ]
    return made


def states(title: str, tells: str, query: Query, *, up: str, down: str) -> Panel:
    """Return a panel of bars that are green while something is up."""
    made = panel(title, tells, query, kind="state-timeline", width=12, showValue="never")
    made["fieldConfig"]["defaults"]["mappings"] = [
        {
            "type": "value",
            "options": {
                "0": {"text": down, "color": "red", "index": 0},
                "1": {"text": up, "color": "green", "index": 1},
            },
        }
    ]
    return made


LAST_ERROR = (
    f"(time() - raft_pipeline_peer_last_error_timestamp_seconds{{{TO}}}) "
    "and on (instance, Local, To) "
    f'label_replace(etcd_network_active_peers{{{REMOTE}}} == 0, "To", "$1", "Remote", "(.*)")'
)

ROWS: dict[str, list[Panel]] = {
    "Which peer is sick, and why": [
        table(
            "Inactive peers, and why",
            "The last failure of each peer that is inactive: one word, which `raft-pipeline "
            "explain` and docs/operations.md explain, and how long ago it was.",
            LAST_ERROR,
            {
                "Local": "node",
                "To": "peer",
                "Verdict": "verdict",
                "Value": "last failure, s ago",
                "instance": "instance",
            },
            unit="s",
        ),
        table(
            "Alerts",
            "What fires of operations/alerts.yml.",
            'ALERTS{alertname=~"Raft.*", alertstate="firing"}',
            {
                "alertname": "alert",
                "severity": "severity",
                "instance": "instance",
                "Local": "node",
                "To": "peer",
            },
        ),
        states(
            "Peers",
            "Whether each node has each peer for active. Of etcd's members as well.",
            (f"etcd_network_active_peers{{{REMOTE}}}", "{{instance}} {{Local}} → {{Remote}}"),
            up="active",
            down="inactive",
        ),
        states(
            "Probes",
            "Whether the last probe was answered: a peer that answers probes and is inactive "
            "refuses what it is sent.",
            (f"raft_pipeline_probe_healthy{{{TO}}}", "{{instance}} {{Local}} → {{To}}"),
            up="answered",
            down="not answered",
        ),
        panel(
            "Failures by verdict",
            "Failures to send, streams not had and streams lost, by why.",
            (
                rate("raft_pipeline_peer_errors_total", TO, "by (instance, Local, To, Verdict)"),
                f"{WAY} {{{{Verdict}}}}",
            ),
            unit="ops",
            width=12,
        ),
        panel(
            "Went inactive",
            "How often, in the last hour. Of etcd's members as well.",
            (
                f"increase(etcd_network_disconnected_peers_total{{{REMOTE}}}[1h])",
                "{{Local}} → {{Remote}}",
            ),
            width=12,
        ),
    ],
    "What goes where": [
        panel(
            "Messages sent",
            "Answered 204, or written whole to a stream.",
            (rate("raft_pipeline_sent_messages_total", TO), WAY),
            unit="ops",
        ),
        panel(
            "Messages sent, by channel",
            "Which way they go: small and frequent ones by streams; all by the pipeline while "
            "there are none.",
            (
                rate(
                    "raft_pipeline_channel_sent_messages_total",
                    TO,
                    "by (instance, Local, To, Channel)",
                ),
                f"{WAY} {{{{Channel}}}}",
            ),
            unit="ops",
        ),
        panel(
            "Bytes sent, by channel",
            "Without the databases of snapshots.",
            (
                rate(
                    "raft_pipeline_channel_sent_bytes_total",
                    TO,
                    "by (instance, Local, To, Channel)",
                ),
                f"{WAY} {{{{Channel}}}}",
            ),
            unit="Bps",
        ),
        panel(
            "Messages lost",
            "Failed: posted and not answered 204, too old, or lost with a stream. Refused: the "
            "queue was full. Dropped: queued at a stop.",
            (rate("raft_pipeline_failed_messages_total", TO), f"{WAY} failed"),
            (rate("raft_pipeline_refused_messages_total", TO), f"{WAY} refused"),
            (rate("raft_pipeline_dropped_messages_total", TO), f"{WAY} dropped"),
            unit="ops",
        ),
        panel(
            "Bytes received",
            "By the member that sent them. Of etcd's members as well.",
            (
                rate("etcd_network_peer_received_bytes_total", NODE, "by (instance, From)"),
                "{{From}} → {{instance}}",
            ),
            unit="Bps",
        ),
        panel(
            "Streams",
            "How many of the two in each direction are up.",
            (
                f"sum by (instance, Local, To, Direction) (raft_pipeline_stream_up{{{TO}}})",
                f"{WAY} {{{{Direction}}}}",
            ),
            most=2,
        ),
    ],
    "What waits": [
        panel(
            "Queues",
            "How full they are, in messages: at 1 what is sent is refused.",
            (
                f"raft_pipeline_channel_queued_messages{{{TO}}} "
                f"/ raft_pipeline_channel_queue_length{{{TO}}}",
                f"{WAY} {{{{Channel}}}}",
            ),
            unit="percentunit",
            most=1,
        ),
        panel(
            "Bytes queued",
            "By channel.",
            (f"raft_pipeline_channel_queued_bytes{{{TO}}}", f"{WAY} {{{{Channel}}}}"),
            unit="bytes",
        ),
        panel(
            "The node's budget",
            "Of the bytes that may wait for all peers together (TransportConfig.queue_bytes).",
            (
                f"raft_pipeline_node_queued_bytes{{{NODE}}} "
                f"/ raft_pipeline_node_queue_bytes{{{NODE}}}",
                "{{instance}} {{Local}}",
            ),
            unit="percentunit",
            most=1,
        ),
        panel(
            "In flight",
            "Messages that are being sent.",
            (f"raft_pipeline_in_flight_messages{{{TO}}}", WAY),
        ),
        panel(
            "Round trips",
            "Of probes, without connecting. Of etcd's members as well.",
            (
                quantile(0.5, "etcd_network_peer_round_trip_time_seconds", TO, ", To"),
                "p50 {{instance}} → {{To}}",
            ),
            (
                quantile(0.99, "etcd_network_peer_round_trip_time_seconds", TO, ", To"),
                "p99 {{instance}} → {{To}}",
            ),
            unit="s",
        ),
        panel(
            "Inbox",
            "Messages in it, and requests that wait for room or for being taken: when they wait "
            "for long, the node is behind.",
            (f"raft_pipeline_inbox_queued_messages{{{NODE}}}", "{{Local}} messages"),
            (f"raft_pipeline_inbox_waiting_requests{{{NODE}}}", "{{Local}} requests waiting"),
        ),
    ],
    "Snapshots": [
        panel(
            "Sending",
            "Bytes of databases a second.",
            (rate("raft_pipeline_snapshot_sent_bytes_total", TO), WAY),
            unit="Bps",
        ),
        panel(
            "Left to send",
            "What a transfer still has to write. Zero with one in flight: the peer stores it.",
            (f"raft_pipeline_snapshot_left_bytes{{{TO}}}", f"{WAY} left"),
            unit="bytes",
        ),
        panel(
            "Receiving",
            "Bytes of databases a second, written to the disk.",
            (
                rate("raft_pipeline_snapshot_received_bytes_total", NODE, "by (instance, Local)"),
                "{{Local}}",
            ),
            unit="Bps",
        ),
        panel(
            "In flight",
            "Transfers, sent and received. Of etcd's members as well.",
            (f"etcd_network_snapshot_send_inflights_total{{{TO}}}", "{{instance}} → {{To}}"),
            (
                f"etcd_network_snapshot_receive_inflights_total{{{NODE}}}",
                "{{From}} → {{instance}}",
            ),
        ),
        panel(
            "Ended, in the last hour",
            "Of etcd's members as well.",
            (
                f"increase(etcd_network_snapshot_send_success{{{TO}}}[1h])",
                "{{instance}} → {{To}} sent",
            ),
            (
                f"increase(etcd_network_snapshot_send_failures{{{TO}}}[1h])",
                "{{instance}} → {{To}} not sent",
            ),
            (
                f"increase(etcd_network_snapshot_receive_success{{{NODE}}}[1h])",
                "{{From}} → {{instance}} received",
            ),
            (
                f"increase(etcd_network_snapshot_receive_failures{{{NODE}}}[1h])",
                "{{From}} → {{instance}} not received",
            ),
        ),
        panel(
            "How long they take",
            "p99 of those sent, of those received, and of the fsync of a received database.",
            (
                quantile(0.99, "etcd_network_snapshot_send_total_duration_seconds", TO, ", To"),
                "{{instance}} → {{To}}",
            ),
            (
                quantile(
                    0.99, "etcd_network_snapshot_receive_total_duration_seconds", NODE, ", From"
                ),
                "{{From}} → {{instance}}",
            ),
            (
                quantile(0.99, "etcd_snap_db_fsync_duration_seconds", NODE, ""),
                "fsync {{instance}}",
            ),
            unit="s",
        ),
    ],
    "The receiver": [
        panel(
            "Requests refused",
            "By why: who calls is of another cluster or version, is not known, or sends what "
            "cannot be taken.",
            (
                rate("raft_pipeline_refused_requests_total", NODE, "by (instance, Local, Verdict)"),
                "{{Local}} {{Verdict}}",
            ),
            unit="ops",
        ),
        panel(
            "Requests taken",
            "Recognised by the core, and read by h11: the second kind is dearer.",
            (
                rate("raft_pipeline_listener_fast_requests_total", NODE, "by (instance, Local)"),
                "{{Local}} core",
            ),
            (
                rate("raft_pipeline_listener_general_requests_total", NODE, "by (instance, Local)"),
                "{{Local}} h11",
            ),
            unit="ops",
        ),
        panel(
            "Connections",
            "Open now.",
            (f"raft_pipeline_listener_connections{{{NODE}}}", "{{Local}} {{Listener}}"),
        ),
        panel(
            "TLS handshakes",
            "Each costs about a millisecond of CPU; a failure is a caller that is not let in.",
            (
                rate("raft_pipeline_listener_handshakes_total", NODE, "by (instance, Local)"),
                "{{Local}} let in",
            ),
            (
                rate(
                    "raft_pipeline_listener_handshake_failures_total", NODE, "by (instance, Local)"
                ),
                "{{Local}} failed",
            ),
            (
                rate(
                    "raft_pipeline_listener_handshake_timeouts_total", NODE, "by (instance, Local)"
                ),
                "{{Local}} timed out",
            ),
            unit="ops",
        ),
        panel(
            "Connections closed, and pauses",
            "For callers that are slow or too many, and for a process that is slower than its "
            "peers send (body).",
            *(
                (
                    rate(f"raft_pipeline_listener_{name}_total", NODE, "by (instance, Local)"),
                    f"{{{{Local}}}} {name.replace('_', ' ')}",
                )
                for name in (
                    *("closed_for_room", "head_timeouts", "body_timeouts", "idle_timeouts"),
                    *("accept_pauses", "body_pauses"),
                )
            ),
            unit="ops",
        ),
        panel(
            "Not received",
            "Bodies that could not be read or decoded, and messages that were dropped: MsgProp "
            "come over a stream without room, and what was in an inbox at a stop.",
            (
                rate("etcd_network_peer_received_failures_total", NODE, "by (instance)"),
                "{{instance}} bodies",
            ),
            (
                rate("raft_pipeline_stream_dropped_messages_total", TO),
                f"{WAY} MsgProp of a stream",
            ),
            (
                rate("raft_pipeline_inbox_dropped_messages_total", NODE, "by (instance, Local)"),
                "{{Local}} inbox",
            ),
            unit="ops",
        ),
    ],
    "The process": [
        panel(
            "CPU",
            "Processors used.",
            (f"rate(process_cpu_seconds_total{{{NODE}}}[$__rate_interval])", "{{instance}}"),
        ),
        panel(
            "Memory",
            "Resident.",
            (f"process_resident_memory_bytes{{{NODE}}}", "{{instance}}"),
            unit="bytes",
        ),
        panel(
            "Descriptors",
            "Of those there may be: five for each peer, one for each connection received.",
            (
                f"process_open_fds{{{NODE}}} / process_max_fds{{{NODE}}}",
                "{{instance}}",
            ),
            unit="percentunit",
        ),
        panel(
            "Certificate",
            "Days until ours expires; only with TLS.",
            (f"raft_pipeline_certificate_expiry_days{{{NODE}}}", "{{instance}} {{Local}}"),
            unit="d",
        ),
        panel(
            "The application",
            "Calls of it that raised, and lines of the log that were lost because it raised.",
            (
                rate("raft_pipeline_callback_errors_total", NODE, "by (instance, Local)"),
                "{{Local}} callbacks",
            ),
            (
                rate("raft_pipeline_process_failures_total", NODE, "by (instance, Local)"),
                "{{Local}} process",
            ),
            (
                rate("raft_pipeline_lost_log_lines_total", NODE, "by (instance)"),
                "{{instance}} log lines",
            ),
            unit="ops",
        ),
        panel(
            "Messages of another raft",
            "Not delivered, being of a later one or never meant for the network, or delivered "
            "without fields that raftpb does not have.",
            (
                rate("raft_pipeline_unknown_messages_total", NODE, "by (instance, Local)"),
                "{{Local}} unknown",
            ),
            (
                rate("raft_pipeline_ignored_messages_total", NODE, "by (instance, Local)"),
                "{{Local}} ignored",
            ),
            (
                rate("raft_pipeline_unknown_fields_total", NODE, "by (instance, Local)"),
                "{{Local}} without fields",
            ),
            unit="ops",
        ),
    ],
}


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "sort": 1,
    }


def dashboard() -> dict[str, Any]:
    """Return the dashboard, as Grafana takes it."""
    panels: list[Panel] = []
    y = 0
    for title, row in ROWS.items():
        head = {"h": 1, "w": 24, "x": 0, "y": y}
        panels.append({"type": "row", "title": title, "panels": [], "gridPos": head})
        x, y = 0, y + 1
        for made in row:
            width = made["gridPos"]["w"]
            if x + width > 24:
                x, y = 0, y + HEIGHT
            panels.append({**made, "gridPos": {**made["gridPos"], "x": x, "y": y}})
            x += width
        y += HEIGHT
    for number, made in enumerate(panels, start=1):
        made["id"] = number
    return {
        "uid": "raft-pipeline",
        "title": "raft-pipeline",
        "description": "Nodes of raft-pipeline, and etcd's members beside them.",
        "tags": ["raft", "etcd"],
        "schemaVersion": 39,
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "label": "Prometheus",
                    "type": "datasource",
                    "query": "prometheus",
                },
                variable("instance", "Node", "label_values(etcd_network_active_peers, instance)"),
                variable(
                    "peer",
                    "Peer",
                    'label_values(etcd_network_active_peers{instance=~"$instance"}, Remote)',
                ),
            ]
        },
        "annotations": {"list": []},
        "panels": panels,
    }


def main() -> None:
    """Write the file beside this one."""
    text = json.dumps(dashboard(), indent=2, ensure_ascii=False)
    Path(__file__).with_name("dashboard.json").write_text(f"{text}\n")


if __name__ == "__main__":
    main()
