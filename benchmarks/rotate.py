"""Lone messages to one peer while the same node shakes hands with many others, as when all
certificates are replaced: the sending half of T5. In a process of its own; prints one JSON object.

The others close each connection with their first answer, and each has a message waiting all the
time, so all their workers dial again and again.
"""

from __future__ import annotations

import argparse
import json
import time

from harness import (
    CLUSTER_ID,
    MEMBER_ID,
    PEER_ID,
    QuietRaft,
    add_tls_options,
    snapshots,
    tls_of,
)

from pipeline import Message, MessageType, SnapshotStatus, Transport, TransportConfig

#: Four workers each.
OTHERS = 16
WARMUP = 20
EVERY_S = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True, help="of the peer")
    parser.add_argument("--closing-port", type=int, required=True, help="of the others")
    parser.add_argument("--messages", type=int, required=True)
    add_tls_options(parser)
    args = parser.parse_args()
    raft, clock = QuietRaft(), time.perf_counter_ns
    config = TransportConfig(streams=False, probe_interval_s=0)
    others = range(1, OTHERS + 1)
    beats = [Message(type=MessageType.HEARTBEAT, to=peer, from_=MEMBER_ID) for peer in others]
    message, times_ns = snapshots("core", 128)(1), []
    with Transport(MEMBER_ID, CLUSTER_ID, raft, config=config, tls=tls_of(args)) as transport:
        transport.add_peer(PEER_ID, [f"https://127.0.0.1:{args.port}"])
        for peer in others:
            transport.add_peer(peer, [f"https://127.0.0.1:{args.closing_port}"])
        for _ in range(WARMUP + args.messages):
            transport.send(beats)  # refused where the queue is full, which it is to be
            time.sleep(EVERY_S)
            start_ns = clock()
            transport.send([message])
            if raft.finished.get(timeout=30) is not SnapshotStatus.FINISH:
                raise SystemExit("a lone message was not delivered")
            times_ns.append(clock() - start_ns)
        books = transport.stats()
        if books[PEER_ID].sent != len(times_ns):
            raise SystemExit(f"not every message was sent once: {books[PEER_ID]}")
    print(json.dumps({"lone_ns": times_ns[WARMUP:], "total": len(times_ns)}))


if __name__ == "__main__":
    main()
