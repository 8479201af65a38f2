"""T5: what a mutual handshake costs each side, and what a flood of them costs everybody else.

The reference is OpenSSL's own ``openssl s_time`` where handshakes are asked for, and bare C, an
epoll loop that calls ``SSL_read``, where they are answered. Certificates are ECDSA P-256.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from exchange import ETCD, Row, driver, expect, go_sender, load, receiver
from harness import HERE, Sink, certificate, quantiles, run_json, tls_flags

OPENSSL = "openssl"
#: Bytes of the message that goes with each handshake of ours and of etcd's.
SMALL = 128
#: Clients of a flood: one would wait for its server each time, two keep it busy.
FLOOD_CLIENTS = 2
FLOOD_S = 60
HEARTBEATS = 300
HEARTBEAT_EVERY_US = 5000


def s_time(port: int, seconds: float) -> list[str]:
    """The command of OpenSSL's own client: handshakes, one after the other, and nothing else."""
    info = certificate()
    files = ("-cert", info.cert_file, "-key", info.key_file, "-CAfile", info.trusted_ca_file)
    return [
        *("openssl", "s_time", "-connect", f"127.0.0.1:{port}", "-new", "-tls1_3"),
        *("-ciphersuites", "TLS_AES_128_GCM_SHA256", "-verify", "1"),
        *("-time", str(max(1, round(seconds))), *map(str, files)),
    ]


def shake(port: int, seconds: float) -> Row:
    """Have OpenSSL's client shake hands for so long: how often, and its own CPU for each."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(s_time(port, seconds), capture_output=True, text=True, check=False)
    took = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = re.search(r"^(\d+) connections in \d+ real seconds", done.stdout, re.MULTILINE)
    if done.returncode or not found or not int(found[1]):
        raise SystemExit(f"openssl s_time: {done.stdout[-300:]}{done.stderr[-300:]}")
    count = int(found[1])
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "msgs_per_s": count / took,
        "cpu_us_per_msg": cpu_s * 1e6 / count,
        "messages": count,
    }


def run_dial(subject: str, size: int, seconds: float, *, tls: bool) -> Row:
    """Handshakes as the client. The sink answers one message and closes, so that each of ours and
    of etcd's needs a new connection: their figure has the message in it, and the dialling. Plain,
    it is these two alone.
    """
    with Sink("--close", tls=tls) as sink:
        if subject == OPENSSL:
            result = shake(sink.port, seconds)
            total = result["messages"]
        elif subject == ETCD:
            go = run_json(*go_sender(sink.port, size, tls=tls), "--seconds", seconds, "--lone", 0)
            result = {key: go[key] for key in ("msgs_per_s", "cpu_us_per_msg", "messages")}
            total = go["total"]
        else:
            ours = run_json(
                *driver("core-prebuilt", "rate", sink.port, size, tls=tls), "--seconds", seconds
            )
            result = {
                "msgs_per_s": ours["messages_per_s"],
                "cpu_us_per_msg": ours["cpu_us_per_message"],
                "messages": ours["messages"],
            }
            total = ours["total"]
    # etcd's streams are refused over connections of their own.
    counted = sink.counters["handshakes" if tls else "connections"]
    more = counted - total
    if sink.counters["bad"] or not 0 <= more <= sink.counters["gets"] + 1:
        raise SystemExit(f"{subject}: {total} connections, the sink counted {sink.counters}")
    return result


def run_accept(subject: str, _size: int, seconds: float) -> Row:
    """Handshakes as the server, asked for by OpenSSL's client."""
    with receiver(subject, tls=True) as listening:
        asked = shake(listening.port, seconds)
    counted = listening.counters.get("handshakes", asked["messages"])
    if counted != asked["messages"]:
        raise SystemExit(f"{subject}: {asked['messages']} handshakes, it counted {counted}")
    return {**asked, "cpu_us_per_msg": listening.counters["cpu_s"] * 1e6 / counted}


@contextmanager
def flood(port: int) -> Iterator[None]:
    """Handshakes as fast as they are answered, from several clients, for as long as the block."""
    with ExitStack() as stack:
        clients = []
        for _ in range(FLOOD_CLIENTS):
            client = subprocess.Popen(
                s_time(port, FLOOD_S), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            stack.callback(client.wait)
            stack.callback(client.kill)
            clients.append(client)
        yield
        if any(client.poll() is not None for client in clients):
            raise SystemExit("the flood ended too early")


def run_flood(subject: str, size: int, _seconds: float) -> Row:
    """Lone heartbeats over a connection that is there already, while others shake hands."""
    one_by_one = ("--connections", 1, "--messages", HEARTBEATS, "--warmup", 10)
    with (
        receiver(subject, tls=True) as listening,
        load(listening.port, size, tls=True) as post,
        flood(listening.port),
    ):
        start = time.perf_counter()
        beats = run_json(*post, *one_by_one, "--times", "--pause", HEARTBEAT_EVERY_US)
        took = time.perf_counter() - start
    times = quantiles(beats["exchange_ns"])
    result: Row = {"p50_us": times["p50"] / 1000, "p99_us": times["p99"] / 1000}
    if "handshakes" in listening.counters:
        result["msgs_per_s"] = listening.counters["handshakes"] / took
    return {**result, "messages": beats["messages"]}


def run_rotation(_subject: str, _size: int, _seconds: float) -> Row:
    """Lone messages of ours, from offer to report, while the same node dials as fast as it can."""
    with Sink(tls=True) as sink, Sink("--close", tls=True) as others:
        start = time.perf_counter()
        result = run_json(
            *(sys.executable, HERE / "rotate.py", "--port", sink.port, *tls_flags()),
            *("--closing-port", others.port, "--messages", HEARTBEATS),
        )
        took = time.perf_counter() - start
    expect("rotation", result["total"], sink.counters)
    times = quantiles(result["lone_ns"])
    return {
        "p50_us": times["p50"] / 1000,
        "p99_us": times["p99"] / 1000,
        "msgs_per_s": others.counters["handshakes"] / took,
        "messages": result["total"],
    }
