"""What the runs of ``make bench-peers`` amount to: ratios, the targets, tables, the chart."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import svg
from exchange import (
    BARE,
    BESIDE,
    ETCD,
    FIGURES,
    INBOX,
    INBOX_ASYNCIO,
    INBOX_UVLOOP,
    OURS,
    OURS_ANEW,
    OURS_ENCODED,
    Row,
)
from handshakes import OPENSSL
from sides import LARGE, PLAIN, SIDES, SMALL, Side, label

FIGURE_NAMES = {
    "cpu_us_per_msg": "CPU, us",
    "receiver_cpu_us_per_msg": "receiver's CPU, us",
    "msgs_per_s": "rate",
    "p50_us": "p50, us",
    "p99_us": "p99, us",
    "rss_above_payload_mb": "memory above the payload, MB",
}
#: What is taken as a ratio within each round.
RATIOS = ("cpu_us_per_msg", "receiver_cpu_us_per_msg", "msgs_per_s", "p50_us")
#: How the tables call a reference; a ratio to bare C, the most frequent, has no name.
REFERENCE_NAMES = {
    BARE: "bare C's",
    OPENSSL: "OpenSSL's",
    PLAIN: "plain's",
    BESIDE: "its own beside a process",
}


@dataclass(frozen=True)
class Target:
    """What design.md section 8 asks of one figure of ours, or of another ``subject`` that is us.

    ``reference`` and ``etcd`` bound its ratio to the subject in C and to etcd's, ``itself`` the
    figure; a rate has to reach its bound, everything else to stay below.
    """

    name: str
    side: str
    size: int
    figure: str = "cpu_us_per_msg"
    reference: float | None = None
    etcd: float | None = None
    itself: float | None = None
    subject: str = OURS


#: Beside Go those of plain messages depend on the host; what holds on any is the bound beside C.
TARGETS = (
    Target("T1", "tls-send", SMALL, reference=1.4, etcd=0.5),
    Target("T1", "tls-send", SMALL, "msgs_per_s", etcd=2.0),
    Target("T2", "tls-receive", SMALL, reference=1.5, etcd=0.55),
    Target("T3", "tls-send", LARGE, reference=1.15, etcd=0.9),
    Target("T3", "tls-send", LARGE, "rss_above_payload_mb", itself=16.8),
    Target("T3", "tls-receive", LARGE, reference=1.3, etcd=0.5),
    Target("T3", "tls-receive", LARGE, "rss_above_payload_mb", itself=16.8),
    Target("T4", "tls-send-spinning", SMALL, "msgs_per_s", reference=0.8),
    Target("T5", "tls-dial", SMALL, reference=1.2),
    Target("T5", "tls-accept", SMALL, reference=1.2),
    Target("T5", "tls-flood", SMALL, "p99_us", itself=10_000),
    Target("T5", "tls-rotation", SMALL, "p99_us", itself=10_000),
    *(
        Target("I1", f"{tls}receive-spinning", SMALL, "msgs_per_s", reference=0.8, subject=INBOX)
        for tls in ("tls-", "")
    ),
    *(
        Target("I2", f"{tls}receive", SMALL, reference=1.6, etcd=0.45, subject=INBOX)
        for tls in ("tls-", "")
    ),
    *(
        Target("I3", f"{tls}receive", SMALL, etcd=0.6, subject=subject)
        for tls in ("tls-", "")
        for subject in (INBOX_ASYNCIO, INBOX_UVLOOP)
    ),
    Target("P1", "send", SMALL, reference=1.25, etcd=0.3),
    Target("P2", "send", SMALL, "msgs_per_s", etcd=3.0),
    Target("P2", "both", SMALL, "msgs_per_s", etcd=2.5),
    Target("P3", "send", LARGE, reference=1.15, etcd=0.35),
    Target("P6", "receive", SMALL, reference=1.5, etcd=0.4),
    Target("P7", "receive", LARGE, etcd=0.25),
    *(
        Target("S1", "stream-msgapp", SMALL, figure, etcd=bound, subject=subject)
        for subject, cpu in ((OURS_ANEW, 1.0), (OURS_ENCODED, 0.6))
        for figure, bound in (
            ("cpu_us_per_msg", cpu),
            ("receiver_cpu_us_per_msg", cpu),
            ("msgs_per_s", 1.0),
        )
    ),
    *(
        Target("S2", "tls-stream-msgapp", SMALL, figure, reference=1.15, subject=subject)
        for subject in (OURS_ANEW, OURS_ENCODED)
        for figure in ("cpu_us_per_msg", "receiver_cpu_us_per_msg")
    ),
    *(
        Target("S3", f"{tls}stream-{kind}", SMALL, "p50_us", etcd=1.0, subject=OURS_ANEW)
        for tls in ("", "tls-")
        for kind in ("msgapp", "message")
    ),
    Target("S4", "stream-spinning", SMALL, "msgs_per_s", reference=0.8, subject=OURS_ENCODED),
)


def ratio_key(subject: str) -> str:
    return f"ratio_to_{subject.replace('-', '_')}"


def add_ratios(results: Sequence[Row]) -> None:
    """Adds to every object what it is to etcd and to the reference of its side in each round, by
    figure: ``ratio_to_etcd``, ``ratio_to_bare_c``, ``ratio_to_openssl``, ``ratio_to_plain`` (the
    same subject without TLS) and so on.
    """
    rounds = {(each["case"], each["subject"]): each["rounds"] for each in results}
    for each in results:
        case, reference = each["case"], SIDES[each["side"]].reference
        held_to = {ETCD: (case, ETCD), reference: (case, reference)}
        if reference == PLAIN:
            held_to[PLAIN] = case.removeprefix("tls-"), each["subject"]
        for subject, its_case in held_to.items():
            theirs = rounds.get(its_case)
            if theirs is None:
                continue
            pairs = list(zip(each["rounds"], theirs, strict=True))
            each[ratio_key(subject)] = {
                key: [mine[key] / their[key] for mine, their in pairs]
                for key in RATIOS
                if all(key in mine and key in their for mine, their in pairs)
            }


def summary(
    rounds: Mapping[tuple[str, str, int], Sequence[Row]],
    apart: Mapping[tuple[str, str, int], Sequence[Row]],
) -> list[Row]:
    """One object for each side, subject and size: the medians of its rounds, the rounds, its
    ratios, and in ``apart`` the runs made while the CPUs shared no cache.
    """
    results: list[Row] = [
        {
            "case": f"{side}-{label(size).replace(' ', '')}",
            "side": side,
            "subject": subject,
            "size_bytes": size,
            **{
                key: statistics.median(each[key] for each in done)
                for key in FIGURES
                if all(key in each for each in done)
            },
            "rounds": done,
            "apart": apart.get((side, subject, size), []),
        }
        for (side, subject, size), done in rounds.items()
        if done
    ]
    add_ratios(results)
    return results


def is_met(figure: str, value: float, bound: float) -> bool:
    return value >= bound if figure == "msgs_per_s" else value <= bound


def judge(results: Sequence[Row]) -> list[Row]:
    """One object for each target that was measured: ours, and beside each thing it is held to the
    ratio of every round, their median, the bound and whether it is met.
    """
    by_case = {(each["side"], each["size_bytes"], each["subject"]): each for each in results}
    found = []
    for target in TARGETS:
        each = by_case.get((target.side, target.size, target.subject))
        figure = target.figure
        if each is None:
            continue
        verdict: Row = {
            "target": target.name,
            "side": target.side,
            "size_bytes": target.size,
            "subject": target.subject,
            "figure": figure,
            "ours": each[figure],
        }
        reference = SIDES[target.side].reference
        for subject, bound in ((reference, target.reference), (ETCD, target.etcd)):
            if ratios := each.get(ratio_key(subject), {}).get(figure):
                median = statistics.median(ratios)
                verdict[subject] = {"rounds": ratios, "median": median}
                if bound is not None:
                    met = is_met(figure, median, bound)
                    verdict[subject] |= {"bound": bound, "met": met}
        if target.itself is not None:
            met = is_met(figure, each[figure], target.itself)
            verdict["itself"] = {"bound": target.itself, "met": met}
        found.append(verdict)
    return found


def amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cells(figure: str, held: Row | None, reference: str = BARE) -> str:
    """Two cells: a ratio with those of its rounds, and its bound with whether it is met. A
    reference that is not the program in C is named.
    """
    if held is None:
        return " | "
    ratio = ""
    if "median" in held:
        ratio = f"{held['median']:.2f} ({' '.join(f'{one:.2f}' for one in held['rounds'])})"
        if reference != BARE:
            ratio += f" of {REFERENCE_NAMES[reference]}"
    if "bound" not in held:
        return f"{ratio} | "
    sign = ">=" if figure == "msgs_per_s" else "<="
    return f"{ratio} | {sign} {amount(held['bound'])} {'yes' if held['met'] else '**no**'}"


def what_of(side: str, size: int, subject: str) -> str:
    """How a row names what it is about; that it is ours goes without saying."""
    return f"{side}, {label(size)}" + ("" if subject == OURS else f", {subject}")


def verdict_table(verdicts: Sequence[Row]) -> str:
    """The targets, and whether each is met: the median of the rounds' ratios, beside the program
    in C, which holds on any host, and beside Go.
    """
    lines = [
        "| target | ours | of bare C's (of each round) | met | of etcd's | met | in itself, met |",
        "| --- | --: | --- | --- | --- | --- | --- |",
    ]
    for each in verdicts:
        figure, side = each["figure"], SIDES[each["side"]]
        to_reference = cells(figure, each.get(side.reference), side.reference)
        _, in_itself = cells(figure, each.get("itself")).split(" | ")
        lines.append(
            f"| {each['target']} {what_of(each['side'], each['size_bytes'], each['subject'])}: "
            f"{FIGURE_NAMES[figure]} | {amount(each['ours'])} "
            f"| {to_reference} | {cells(figure, each.get(ETCD))} "
            f"| {in_itself} |"
        )
    return "\n".join(lines)


def while_apart(results: Sequence[Row]) -> str:
    """The same ratios while the CPUs shared no cache, as far as they did: of the medians."""
    runs = {(each["side"], each["size_bytes"], each["subject"]): each["apart"] for each in results}
    found = []
    for target in TARGETS:
        side, size, figure = target.side, target.size, target.figure
        ours, etcd = (runs.get((side, size, subject)) for subject in (target.subject, ETCD))
        if ours and etcd and target.etcd is not None:
            mine, theirs = (statistics.median(run[figure] for run in each) for each in (ours, etcd))
            what = what_of(side, size, target.subject)
            found.append(
                f"{what}: {FIGURE_NAMES[figure]} {mine / theirs:.2f} "
                f"({len(ours)} and {len(etcd)} runs)"
            )
    if not found:
        return ""
    return (
        "That is with CPUs that share a cache. While the host had them apart, of etcd's: "
        f"{'; '.join(found)}."
    )


def table(results: Sequence[Row]) -> str:
    """One table for each side that was measured, without the columns that say nothing there."""
    tables = []
    for name, side in SIDES.items():
        of_side = [each for each in results if each["side"] == name]
        if not of_side:
            continue
        theirs = REFERENCE_NAMES[side.reference]
        header = [
            *(side.title, "subject", f"{side.counted}/s", f"CPU us/{side.counted[:-1]}"),
            "receiver's CPU",
            *(f"of {theirs} CPU", f"of {theirs} receiver's CPU", f"of {theirs} rate"),
            *("of etcd's CPU", "of etcd's receiver's CPU", "of etcd's rate"),
            *("p50 us", "p99 us", "memory above payload, MB"),
        ]
        ordered = sorted(of_side, key=lambda each: int(each["size_bytes"]))
        rows = [row_of(side, each) for each in ordered]
        shown = [i for i in range(len(header)) if any(row[i] for row in rows)]
        rule = ["---" if i < 2 else "--:" for i in range(len(header))]
        tables.append(
            "\n".join(f"| {' | '.join(row[i] for i in shown)} |" for row in (header, rule, *rows))
        )
    return "\n\n".join(tables)


def row_of(side: Side, each: Row) -> list[str]:
    """The cells of one subject and size; empty where nothing was measured."""
    rate, cpu, receiver_cpu, p50, p99, memory = (each.get(key) for key in FIGURES)
    ratios = [
        each.get(ratio_key(subject), {}).get(key)
        for subject in (side.reference, ETCD)
        for key in ("cpu_us_per_msg", "receiver_cpu_us_per_msg", "msgs_per_s")
    ]
    return [
        label(each["size_bytes"]),
        each["subject"],
        *("" if value is None else amount(value) for value in (rate, cpu, receiver_cpu)),
        *(f"{statistics.median(rounds):.2f}" if rounds else "" for rounds in ratios),
        *("" if value is None else amount(value) for value in (p50, p99)),
        "" if memory is None else f"{memory:.1f}",
    ]


def chart(results: Sequence[Row]) -> str:
    panels = {}
    for side in (
        *("tls-send", "tls-receive", "send", "receive"),
        *("tls-stream-msgapp", "tls-stream-message", "stream-msgapp", "stream-message"),
    ):
        for size in (SMALL, LARGE):
            values = {
                each["subject"]: each["cpu_us_per_msg"]
                for each in results
                if (each["side"], each["size_bytes"]) == (side, size)
            }
            if values:
                ranked = dict(sorted(values.items(), key=lambda item: item[1]))
                what = side.replace("tls-", "mutual TLS, ")
                panels[f"{what}, {label(size)}: CPU us per message (log scale, less is good)"] = (
                    ranked
                )
    return svg.bars(panels, OURS)
