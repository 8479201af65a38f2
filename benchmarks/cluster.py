"""What a cluster of two does when the second member is ours: ``make bench-cluster``.

An etcd leads, and the other member is another etcd, or the example follower (``examples``). Each
write waits for it: two are a majority of two. etcd's own client writes to the leader, with 1, 16
and 64 writers at once. All clusters of a round are up at the same time and take turns, so that what
the machine does meets all of them; ratios are taken within a round, and medians are shown. Ours has
no disk: it answers when it has an entry in memory. ``ours-by-posts`` is ours without streams.

Writes results/cluster.json and cluster.md. ``cluster.py member`` is our member, in a process of its
own, until stdin ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from harness import BIN, HERE, Listening, add_tls_options, machine, posted, run_json, say, tls_of
from quiet import PATIENCE_HELP, TICKS_PER_S, Watch, remark
from report import put_into

from pipeline import Inbox, TLSInfo, Transport, TransportConfig
from pipeline.examples.certificates import Certificates
from pipeline.examples.etcd import EtcdMember, config_beside, find_etcd, free_port
from pipeline.examples.follower import Follower

Row = dict[str, Any]

ETCD, OURS, POSTS = "etcd", "ours", "ours-by-posts"
SUBJECTS = (ETCD, OURS, POSTS)
WRITERS = (1, 16, 64)
VALUE_BYTES = 128
#: What is taken as a ratio to two etcds within each round, and what H1 asks of it.
BOUNDS = {"commits_per_s": 1.0, "p99_us": 1.0}
RATIOS = (*BOUNDS, "p50_us", "member_cpu_us", "leader_cpu_us")


def member(args: argparse.Namespace) -> None:
    """Be the second member of the cluster of one etcd, as the demo is."""
    follower = Follower(args.member_id, args.peer_id, campaigns=False)
    config = config_beside(args.etcd_version, TransportConfig(streams=not args.posts))
    inbox = Inbox()
    transport = Transport(
        args.member_id,
        args.cluster_id,
        follower,
        peer_urls=[args.url],
        config=config,
        tls=tls_of(args),
        inbox=inbox,
    )
    with transport:
        transport.add_peer(args.peer_id, [args.peer_url])
        transport.listen(args.url)
        follower.start(transport.send, inbox=inbox)
        print(f"listening {args.url.rpartition(':')[2]}", flush=True)
        sys.stdin.read()
        follower.stop()
        state, posts = follower.state(), posted(transport, args.peer_id)
    print(
        json.dumps(
            {
                "commit": state.commit,
                "received": sum(follower.received.values()),
                "sent": sum(follower.sent.values()),
                "posts": posts,
            }
        )
    )


def cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(words[11]) + int(words[12])) / TICKS_PER_S


@dataclass(frozen=True)
class Cluster:
    """Two members that are up, and where to write."""

    client_url: str
    leader_pid: int
    member_pid: int


@contextmanager
def two_etcds(directory: Path, theirs: TLSInfo | None, other: TLSInfo | None) -> Iterator[Cluster]:
    scheme = "https" if theirs else "http"
    url = f"{scheme}://127.0.0.1:{free_port()}"
    for name in ("leader", "second"):
        (directory / name).mkdir()
    leader = EtcdMember(find_etcd(), directory / "leader", url, tls=theirs)
    second = EtcdMember(find_etcd(), directory / "second", leader.peer_url, tls=other, peer_url=url)
    with ExitStack() as stack:
        for etcd in (leader, second):
            stack.callback(etcd.stop)
            etcd.start()
        for etcd in (leader, second):
            etcd.wait_ready()
        status = leader.call("/v3/maintenance/status", {})
        if status["leader"] != str(leader.id):
            second.insist(partial(second.move_leader, leader.id))
        yield Cluster(leader.client_url, leader.pid, second.pid)


@contextmanager
def ours(
    directory: Path, theirs: TLSInfo | None, other: TLSInfo | None, *, posts: bool
) -> Iterator[Cluster]:
    scheme = "https" if theirs else "http"
    url = f"{scheme}://127.0.0.1:{free_port()}"
    leader = EtcdMember(find_etcd(), directory, url, tls=theirs)
    command: list[object] = [sys.executable, HERE / "cluster.py", "member", "--url", url]
    command += ["--member-id", leader.other_id, "--cluster-id", leader.cluster_id]
    command += ["--peer-id", leader.id, "--peer-url", leader.peer_url]
    command += ["--etcd-version", leader.version, *(["--posts"] if posts else [])]
    if other is not None:
        command += ["--cert", other.cert_file, "--ca", other.trusted_ca_file]
    with Listening(*command) as second, ExitStack() as stack:
        stack.callback(leader.stop)
        leader.start()
        leader.wait_ready()
        yield Cluster(leader.client_url, leader.pid, second.pid)
    if posts != (second.counters["posts"] > second.counters["sent"] / 2):
        raise SystemExit(f"it went by another channel than it should: {second.counters}")


STARTERS = {ETCD: two_etcds, OURS: partial(ours, posts=False), POSTS: partial(ours, posts=True)}


def write(cluster: Cluster, writers: int, seconds: float) -> Row:
    """Write to a cluster: commits a second, their latencies, and the CPU of both members."""
    before = [cpu_s(pid) for pid in (cluster.leader_pid, cluster.member_pid)]
    command = [BIN / "clientv3", "--endpoint", cluster.client_url, "--writers", writers]
    result = run_json(*command, "--seconds", seconds, "--size", VALUE_BYTES)
    leader_s, member_s = (
        cpu_s(pid) - start
        for pid, start in zip((cluster.leader_pid, cluster.member_pid), before, strict=True)
    )
    each_us = 1e6 / result.pop("all_commits")
    return {**result, "leader_cpu_us": leader_s * each_us, "member_cpu_us": member_s * each_us}


Case = tuple[bool, int, str]  # over TLS, writers, subject


def one_round(
    subjects: Sequence[str], seconds: float, watch: Watch, *, tls: bool
) -> Iterator[tuple[Case, Row]]:
    """Start every cluster, and have each written to in turn."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-cluster-")))
        certificates = Certificates(directory) if tls else None
        theirs, other = (
            certificates and certificates.issue(name, days=1) for name in ("leader", "second")
        )
        clusters = {}
        for n, subject in enumerate(subjects):
            own = directory / str(n)
            own.mkdir()
            clusters[subject] = stack.enter_context(STARTERS[subject](own, theirs, other))
        for writers in WRITERS:
            for subject, cluster in clusters.items():
                say(f"{'TLS' if tls else 'plain'}, {writers} writers: {subject}")
                run = partial(write, cluster, writers, seconds)
                yield (tls, writers, subject), watch.run(run)


def summary(rounds: Mapping[Case, Sequence[Row]]) -> list[Row]:
    """One object for each case: the medians of its rounds, the rounds, its ratios to two etcds, and
    whether they are as H1 asks.
    """
    results = []
    for (tls, writers, subject), done in rounds.items():
        result: Row = {
            "tls": tls,
            "writers": writers,
            "subject": subject,
            **{
                key: statistics.median(each[key] for each in done)
                for key in ("commits_per_s", "p50_us", "p99_us", "leader_cpu_us", "member_cpu_us")
            },
            "rounds": list(done),
        }
        theirs = rounds.get((tls, writers, ETCD))
        if subject != ETCD and theirs:
            pairs = list(zip(done, theirs, strict=True))
            ratios = {key: [mine[key] / its[key] for mine, its in pairs] for key in RATIOS}
            medians = {key: statistics.median(each) for key, each in ratios.items()}
            result |= {"ratios": ratios, "ratio": medians}
        if subject == OURS and "ratio" in result:
            ratio = result["ratio"]
            result["met"] = {
                "commits_per_s": ratio["commits_per_s"] >= BOUNDS["commits_per_s"],
                "p99_us": ratio["p99_us"] <= BOUNDS["p99_us"],
            }
        results.append(result)
    return results


def table(results: Sequence[Row]) -> str:
    lines = [
        "| second member | writers | commits/s | of two etcds' (of each round) | H1 | p50 ms "
        "| p99 ms | of two etcds' (of each round) | H1 | CPU us/commit, leader | second member |",
        "| --- | --: | --: | --- | --- | --: | --: | --- | --- | --: | --: |",
    ]

    def cells(each: Row, figure: str) -> str:
        """A ratio and those of its rounds, and whether it is as it must be."""
        if "ratio" not in each:
            return " | "
        of_rounds = " ".join(f"{one:.2f}" for one in each["ratios"][figure])
        met = ""
        if "met" in each:
            sign = ">=" if figure == "commits_per_s" else "<="
            met = f"{sign} {BOUNDS[figure]:g} {'yes' if each['met'][figure] else '**no**'}"
        return f"{each['ratio'][figure]:.2f} ({of_rounds}) | {met}"

    for each in results:
        lines.append(
            f"| {each['subject']}{', mutual TLS' if each['tls'] else ''} | {each['writers']} "
            f"| {each['commits_per_s']:,.0f} | {cells(each, 'commits_per_s')} "
            f"| {each['p50_us'] / 1000:.2f} | {each['p99_us'] / 1000:.2f} "
            f"| {cells(each, 'p99_us')} "
            f"| {each['leader_cpu_us']:.0f} | {each['member_cpu_us']:.0f} |"
        )
    return "\n".join(lines)


def footer(run: Row, results: Sequence[Row]) -> str:
    where = run["machine"]
    lines = [
        f"{where['cpu']}, {where['cores']} cores, Linux {where['kernel']}, {where['python']}, "
        f"etcd {run['etcd']}; values of {VALUE_BYTES} B; median of {run['rounds']} interleaved "
        f"rounds of {run['seconds']} s; {run['when']}; `make bench-cluster`"
    ]
    if disturbed := remark([one for each in results for one in each["rounds"]]):
        lines.append(disturbed)
    return "\n\n".join(lines)


def measure(args: argparse.Namespace) -> tuple[Row, list[Row]]:
    rounds: dict[Case, list[Row]] = {}
    watch = Watch(args.patience)
    subjects = [subject for subject in SUBJECTS if subject in args.subjects.split(",")]
    for _ in range(args.rounds):
        for tls in (False, True):
            for case, result in one_round(subjects, args.seconds, watch, tls=tls):
                rounds.setdefault(case, []).append(result)
    say("")
    run = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "make bench-cluster",
        "machine": machine(),
        "etcd": EtcdMember(find_etcd(), Path(), "http://127.0.0.1:1").version,
        "rounds": args.rounds,
        "seconds": args.seconds,
    }
    return run, summary(dict(sorted(rounds.items(), key=lambda item: item[0][:2])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measured run")
    parser.add_argument("--patience", type=float, default=300.0, help=PATIENCE_HELP)
    parser.add_argument("--subjects", default=f"{ETCD},{OURS}", help=f"of {SUBJECTS}, by commas")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cluster.json")
    parser.add_argument("--into", type=Path, help="put the table into this file as well")
    parser.add_argument("--report", action="store_true", help="of the file there is; no run")
    one = commands.add_parser("member")
    for name in ("--member-id", "--cluster-id", "--peer-id"):
        one.add_argument(name, type=int, required=True)
    for name in ("--url", "--peer-url", "--etcd-version"):
        one.add_argument(name, required=True)
    one.add_argument("--posts", action="store_true", help="without streams")
    add_tls_options(one)
    args = parser.parse_args()
    if args.command == "member":
        member(args)
        return
    if not args.report:
        run, results = measure(args)
        args.out.write_text(json.dumps({**run, "results": results}, indent=1) + "\n")
    run = json.loads(args.out.read_text())
    text = f"{table(run['results'])}\n\n{footer(run, run['results'])}\n"
    args.out.with_suffix(".md").write_text(text)
    print(text)
    if args.into:
        put_into(args.into, f"\n{text}", "bench-cluster")


if __name__ == "__main__":
    main()
