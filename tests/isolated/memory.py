"""A 64 MiB snapshot is not copied: ``memory.py PORT`` prints by how many bytes the peak grew."""

from __future__ import annotations

import sys
import threading

from pipeline import Message, Pipeline, Snapshot
from pipeline.types import MessageType
from tests.support import LONG_TIMEOUT
from tests.support.memory import peak

PAYLOAD = bytes(64 << 20)


class Raft:
    def __init__(self) -> None:
        self.reported = threading.Event()

    def report_snapshot(self, member_id: int, status: int) -> None:
        self.reported.set()

    def report_unreachable(self, member_id: int) -> None:
        print("unreachable", flush=True)

    process = is_id_removed = report_unreachable


def main() -> None:
    raft = Raft()
    small = Message(type=MessageType.SNAP, to=2, snapshot=Snapshot(data=b"small"))
    large = Message(type=MessageType.SNAP, to=2, snapshot=Snapshot(data=PAYLOAD))
    with Pipeline(
        2, [f"http://127.0.0.1:{sys.argv[1]}"], raft, member_id=1, cluster_id=1
    ) as pipeline:
        for index, message in enumerate((small, large, large, large)):
            if index == 1:
                before = peak()
            raft.reported.clear()
            pipeline.send(message)
            if not raft.reported.wait(LONG_TIMEOUT):
                print("timeout", flush=True)
                return
    print(peak() - before, flush=True)


if __name__ == "__main__":
    # Touched, so that the payload is resident before the first measurement.
    assert not any(PAYLOAD[::4096])
    main()
