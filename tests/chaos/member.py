"""A member of ours as a process of its own, so that it can be killed: ``python -m`` with a JSON
object on the command line. Every fifth of a second it prints where it stands, as a line of JSON."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import Inbox, ReceiverConfig, TLSInfo, Transport, TransportConfig
from pipeline.examples.etcd import config_beside
from pipeline.examples.follower import Follower
from pipeline.examples.storage import Storage

REPORT_INTERVAL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a member is started with. ``peers`` are URLs by ID in decimal, as JSON has it; ``tls``
    are a certificate, its key and the authority."""

    member_id: int
    cluster_id: int
    url: str
    listen_url: str
    peers: dict[str, str]
    directory: str
    etcd_version: str
    tls: tuple[str, str, str] | None

    @property
    def storage(self) -> Path:
        """The file of its log."""
        return Path(self.directory, "log")

    @property
    def snapshots(self) -> Path:
        """The folder of the databases it was sent."""
        return Path(self.directory, "snapshots")


def balances(transport: Transport) -> bool:
    """Tell whether every message offered to any peer has exactly one place in the books."""
    return all(
        b.offered == b.accepted + b.refused
        and b.accepted == b.sent + b.failed + b.dropped + b.queued + b.in_flight
        for b in transport.stats().values()
    )


def main(setting: Setting) -> None:
    """Run until SIGTERM."""
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    receiver = ReceiverConfig(snapshot_dir=setting.snapshots)
    config = config_beside(setting.etcd_version, TransportConfig(receiver=receiver))
    tls = None
    if setting.tls is not None:
        cert, key, authority = setting.tls
        tls = TLSInfo(cert_file=cert, key_file=key, trusted_ca_file=authority)
    peers = {int(id_): url for id_, url in setting.peers.items()}

    with Storage(setting.storage) as storage:
        follower = Follower(setting.member_id, *peers, takes_snapshots=True, storage=storage)

        def report(transport: Transport) -> None:
            at = time.monotonic()  # of the machine, so comparable with that of other processes
            state = {"at": at, **asdict(follower.state()), "balances": balances(transport)}
            state["role"] = state["role"].value
            print(json.dumps(state), flush=True)

        inbox = Inbox()
        transport = Transport(
            setting.member_id,
            setting.cluster_id,
            follower,
            peer_urls=[setting.url],
            tls=tls,
            config=config,
            inbox=inbox,
        )
        with transport:
            for peer_id, url in peers.items():
                transport.add_peer(peer_id, [url])
            transport.listen(setting.listen_url)
            follower.start(transport.send, inbox=inbox)
            while not stopped.wait(REPORT_INTERVAL_S):
                report(transport)
            follower.stop()
            report(transport)


if __name__ == "__main__":
    main(Setting(**json.loads(sys.argv[1])))
