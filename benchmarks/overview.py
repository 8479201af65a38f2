"""The chart and the table of the README, out of the results that are committed.

``python benchmarks/overview.py`` writes results/overview.svg and puts the table between its
markers in README.md; it measures nothing. A test holds both to the results.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import svg
from exchange import BARE, ETCD, INBOX, OURS, OURS_ANEW
from handshakes import OPENSSL
from report import put_into
from sides import LARGE, SMALL
from verdicts import amount, ratio_key

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
CHART = RESULTS / "overview.svg"
README = HERE.parent / "README.md"

Row = dict[str, Any]
#: By who is shown, what was measured: ours, etcd's Go, the program in C.
Figures = dict[str, float]
NAMES = ("ours", "etcd's Go", "bare C")


class Results(NamedTuple):
    """What the last official runs have left."""

    tls: Sequence[Row]
    streams: Sequence[Row]
    cluster: Mapping[str, Any]


def load() -> Results:
    return Results(
        json.loads((RESULTS / "tls" / "peers.json").read_text()),
        json.loads((RESULTS / "streams" / "peers.json").read_text()),
        json.loads((RESULTS / "cluster.json").read_text()),
    )


def find(results: Sequence[Row], side: str, subject: str, size: int) -> Row | None:
    for each in results:
        if (each["side"], each["subject"], each["size_bytes"]) == (side, subject, size):
            return each
    return None


class Asked(NamedTuple):
    """One figure of ours, and who is shown beside it."""

    results: Sequence[Row]
    side: str
    figure: str
    ours: str
    bare: str = BARE
    size: int = SMALL


def figures(asked: Asked) -> Figures:
    """The figure of each who was measured, by the names that are shown."""
    found = {
        name: find(asked.results, asked.side, subject, asked.size)
        for name, subject in zip(NAMES, (asked.ours, ETCD, asked.bare), strict=True)
    }
    figure = asked.figure
    return {name: each[figure] for name, each in found.items() if each and figure in each}


def chart(results: Results) -> str:
    """Over mutual TLS, 128 B: CPU of a message at one end, and how many there are in a second."""
    cpu, rate = "cpu_us_per_msg", "msgs_per_s"

    def posts(side: str, ours: str) -> tuple[Figures, Figures]:
        asked = Asked(results.tls, side, cpu, ours)
        return figures(asked), figures(asked._replace(figure=rate))

    stream = Asked(results.streams, "tls-stream-msgapp", cpu, OURS_ANEW)
    return svg.groups(
        ("CPU of one message, us (less is good)", "messages a second (more is good)"),
        {
            "posts, sent": posts("tls-send", OURS),
            "posts, received": posts("tls-receive", INBOX),
            "by a stream, sent": (figures(stream), figures(stream._replace(figure=rate))),
            # What one end sends in a second, the other receives.
            "by a stream, received": (figures(stream._replace(figure=f"receiver_{cpu}")), {}),
        },
        highlight=NAMES[0],
    )


def line(text: str, asked: Asked, shown: Callable[[float], str] = amount) -> str:
    """One row of the table; what is worse than etcd's by the median of the rounds stands out."""
    cells = figures(asked)
    mine = find(asked.results, asked.side, asked.ours, asked.size)
    assert mine is not None, asked.side
    ratios = {
        subject: statistics.median(rounds)
        for subject in (ETCD, asked.bare)
        if (rounds := mine.get(ratio_key(subject), {}).get(asked.figure))
    }
    return row(
        text,
        [shown(cells[name]) if name in cells else "" for name in NAMES],
        [ratios.get(ETCD), ratios.get(asked.bare)],
        is_more_good=asked.figure == "msgs_per_s",
    )


def row(
    text: str, cells: Sequence[str], ratios: Sequence[float | None], *, is_more_good: bool
) -> str:
    shown = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
    to_etcd = ratios[0]
    if to_etcd is not None and (to_etcd < 1 if is_more_good else to_etcd > 1):
        shown[0] = f"**{shown[0]}**"
    return f"| {' | '.join([text, *cells, *shown])} |"


def commits(results: Results, writers: int) -> str:
    """How many an etcd that leads commits with us as its second member, beside one of its own."""
    by_subject = {
        each["subject"]: each
        for each in results.cluster["results"]
        if each["tls"] and each["writers"] == writers
    }
    ours, etcd = by_subject["ours"], by_subject["etcd"]
    pairs = zip(ours["rounds"], etcd["rounds"], strict=True)
    ratio = statistics.median(mine["commits_per_s"] / its["commits_per_s"] for mine, its in pairs)
    return row(
        f"commits a second of two members, etcd leads, {writers} writers",
        [amount(ours["commits_per_s"]), amount(etcd["commits_per_s"]), ""],
        [ratio, None],
        is_more_good=True,
    )


def milliseconds(microseconds: float) -> str:
    return f"{microseconds / 1000:.1f}"


def table(results: Results) -> str:
    cpu, rate = "cpu_us_per_msg", "msgs_per_s"
    tls = results.tls
    stream = Asked(results.streams, "tls-stream-msgapp", cpu, OURS_ANEW)
    lone = stream._replace(figure="p50_us")
    large = Asked(tls, "tls-send", cpu, OURS, size=LARGE)
    busy = Asked(tls, "tls-receive-spinning", rate, INBOX)
    lines = [
        "| mutual TLS, 128 B unless it says otherwise | ours | etcd's Go | bare C | of etcd's "
        "| of bare C's |",
        "|---|--:|--:|--:|--:|--:|",
        line("a post, sent: CPU, us", Asked(tls, "tls-send", cpu, OURS)),
        line("a post, received into an `Inbox`: CPU, us", Asked(tls, "tls-receive", cpu, INBOX)),
        line("by a stream, sent: CPU, us", stream),
        line("by a stream, received: CPU, us", stream._replace(figure=f"receiver_{cpu}")),
        commits(results, 16),
        line("64 MiB, sent: CPU, ms", large, milliseconds),
        line("64 MiB, received: CPU, ms", large._replace(side="tls-receive"), milliseconds),
        line("posts a second into an `Inbox`, Python computing all the time", busy),
        line("the same by `Raft.process`, which needs the GIL", busy._replace(ours=OURS)),
        line("a lone MsgApp by a stream: p50, us", lone),
        line("the same without TLS", lone._replace(side="stream-msgapp")),
        line("a lone heartbeat, without TLS: p50, us", lone._replace(side="stream-message")),
        line(
            "a handshake, as the client: CPU, us (C: `openssl s_time`)",
            Asked(tls, "tls-dial", cpu, OURS, OPENSSL),
        ),
        line("a handshake, as the server: CPU, us", Asked(tls, "tls-accept", cpu, OURS)),
    ]
    return "\n".join(lines)


def main() -> None:
    results = load()
    CHART.write_text(chart(results))
    put_into(README, f"\n{table(results)}\n", "overview")


if __name__ == "__main__":
    main()
