"""An etcd in a network of its own, and packets to it, from it or both that are lost for a while.

Runs in a network of its own as well, as its root: ``unshare --net``. Arguments: a directory, http
or https, and whose packets are lost.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipeline import TransportConfig
from pipeline.examples.etcd import find_etcd
from tests.support.cuts import go_through
from tests.support.etcd import Cluster
from tests.support.tls import Authority
from tests.support.waiting import eventually

directory, scheme, lost = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
OURS, THEIRS = "10.0.7.1", "10.0.7.2"
#: By a way of their own, which is not cut: what clients ask.
CLIENTS, CLIENT_API = "10.0.8.1", "10.0.8.2"
#: The devices of the two, and one that nobody has: a packet that is sent to it is lost.
OUR_DEVICE, THEIR_DEVICE, NOBODY = "02:00:00:00:00:01", "02:00:00:00:00:02", "02:00:00:00:00:03"


def call(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
inside = ("nsenter", "--target", str(holder.pid), "--net")
try:
    mine = Path("/proc/self/ns/net").readlink()
    eventually(lambda: Path(f"/proc/{holder.pid}/ns/net").readlink() != mine, "another network")
    call("ip", "link", "set", "lo", "up")
    call(*inside, "ip", "link", "set", "lo", "up")
    for here, there, address, other in (
        ("peer0", "peer1", OURS, THEIRS),
        ("client0", "client1", CLIENTS, CLIENT_API),
    ):
        call("ip", "link", "add", "name", here, "type", "veth", "peer", "name", there)
        call("ip", "link", "set", there, "netns", str(holder.pid))
        for side, device, own in (((), here, address), (inside, there, other)):
            call(*side, "ip", "address", "add", f"{own}/24", "dev", device)
            call(*side, "ip", "link", "set", device, "up")
    call("ip", "link", "set", "peer0", "address", OUR_DEVICE)
    call(*inside, "ip", "link", "set", "peer1", "address", THEIR_DEVICE)

    def send_to(*, ours: str, theirs: str) -> None:
        """Have what we send, and what etcd does, go to these devices."""
        at = ("nud", "permanent")
        call("ip", "neighbour", "replace", THEIRS, "lladdr", ours, "dev", "peer0", *at)
        call(*inside, "ip", "neighbour", "replace", OURS, "lladdr", theirs, "dev", "peer1", *at)

    def heal() -> None:
        send_to(ours=THEIR_DEVICE, theirs=OUR_DEVICE)

    def cut() -> None:
        send_to(
            ours=THEIR_DEVICE if lost == "theirs" else NOBODY,
            theirs=OUR_DEVICE if lost == "ours" else NOBODY,
        )

    start = directory / "etcd-elsewhere"
    start.write_text(f'#!/bin/sh\nexec {" ".join(inside)} {find_etcd()} "$@"\n')
    start.chmod(0o755)
    authority = Authority(directory / "certs", (OURS, THEIRS)) if scheme == "https" else None
    cluster = Cluster(
        directory,
        config=TransportConfig(streams=True),
        campaigns=False,
        authority=authority,
        binary=start,
        our_url=f"{scheme}://{OURS}:2380",
        etcd_url=f"{scheme}://{THEIRS}:2380",
    )
    cluster.etcd.client_url = f"http://{CLIENT_API}:2379"
    heal()
    try:
        go_through(cluster, cut, heal)
    finally:
        cluster.stop()
finally:
    holder.kill()
    holder.wait()
