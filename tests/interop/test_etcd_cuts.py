"""A real etcd and our Transport, joined by streams, whose ways to each other are cut and healed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from pipeline.examples.etcd import free_port
from tests.chaos.link import Fault, Link, Network
from tests.support.cuts import CUT_S, go_through
from tests.support.etcd import Cluster
from tests.support.processes import run_under
from tests.support.tls import Authority

pytestmark = [pytest.mark.etcd, pytest.mark.streams]


class Linked(Cluster):
    """Each dials the other by a link: who dials whom decides what goes by which."""

    def __init__(self, directory: Path, network: Network, authority: Authority | None) -> None:
        scheme = "http" if authority is None else "https"
        port = free_port()
        to_us = network.link("etcd to us", port)
        super().__init__(
            directory,
            authority=authority,
            campaigns=False,
            our_url=f"{scheme}://127.0.0.1:{to_us.port}",
        )
        self.listen_url = f"{scheme}://127.0.0.1:{port}"
        to_etcd = network.link("us to etcd", int(self.etcd.peer_url.rpartition(":")[2]))
        self.dialled_url = f"{scheme}://127.0.0.1:{to_etcd.port}"
        self.links = {"etcd to us": [to_us], "us to etcd": [to_etcd], "both": [to_us, to_etcd]}


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as network:
        yield network


def go_through_fault(
    cluster: Linked, network: Network, links: list[Link], fault: Fault, cut_s: float = CUT_S
) -> None:
    def change(fault: Fault) -> None:
        for link in links:
            network.change(link, fault)

    try:
        go_through(cluster, partial(change, fault), partial(change, Fault.NONE), cut_s)
    finally:
        cluster.stop()


@pytest.mark.parametrize("links", ["etcd to us", "us to etcd", "both"])
def test_a_link_that_is_reset_and_refused_for_a_moment_is_used_again(
    tmp_path: Path, network: Network, links: str
) -> None:
    cluster = Linked(tmp_path, network, None)
    go_through_fault(cluster, network, cluster.links[links], Fault.CUT, cut_s=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault.CUT, Fault.HOLE, Fault.MUTE])
@pytest.mark.parametrize(
    ("links", "has_tls"),
    [("etcd to us", False), ("us to etcd", False), ("both", False), ("both", True)],
    ids=["etcd to us", "us to etcd", "both", "both, TLS"],
)
def test_a_link_that_is_cut_for_longer_than_silence_is_listened_to_is_used_again(
    tmp_path: Path, network: Network, links: str, has_tls: bool, fault: Fault
) -> None:
    authority = Authority(tmp_path / "certs") if has_tls else None
    cluster = Linked(tmp_path, network, authority)
    go_through_fault(cluster, network, cluster.links[links], fault)


def namespaces() -> tuple[str, ...]:
    """Return what runs a program in a network of its own; nothing where that is not allowed."""
    as_root = () if os.geteuid() == 0 else ("--map-root-user",)
    command = ("unshare", *as_root, "--net", "--kill-child", "--fork")
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return ()
    probe = (*command, "ip", "link", "add", "name", "one", "type", "veth", "peer", "name", "two")
    done = subprocess.run(probe, check=False, capture_output=True)
    return command if done.returncode == 0 else ()


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["ours", "theirs", "both"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_packets_that_are_lost_for_a_while_cost_no_message_without_an_outcome(
    tmp_path: Path, scheme: str, lost: str
) -> None:
    """Without a word of the network: what is sent is not answered."""
    if not (command := namespaces()):
        pytest.skip("no network namespaces may be made here")
    done = run_under(command, "lost_packets.py", str(tmp_path), scheme, lost)
    assert done.returncode == 0, done.stdout + done.stderr
