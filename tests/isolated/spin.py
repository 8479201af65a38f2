"""Messages leave while the main thread never lets go of the GIL (design R2).

``spin.py MODE PORT COUNTER_FILE [CERT KEY CA]``; prints "ok" or why not. With certificates over
TLS. Modes:

queued      everything that was queued arrives while the main thread spins
contended   the same while another thread was cut off in the middle of a send
"""

from __future__ import annotations

import mmap
import struct
import sys
import threading
import time

from pipeline import Entry, Message, Pipeline, PipelineConfig, TLSInfo
from pipeline.tls.credentials import Credentials
from pipeline.types import MessageType
from tests.support import LONG_TIMEOUT

mode, port, path, *files = sys.argv[1:]
credentials = None
if files:
    cert, key, ca = files
    credentials = Credentials(TLSInfo(cert_file=cert, key_file=key, trusted_ca_file=ca))
with open(path, "r+b") as file:
    counter = mmap.mmap(file.fileno(), 8)


def arrived() -> int:
    return struct.unpack_from("=Q", counter)[0]


class Raft:
    def report_unreachable(self, member_id: int) -> None:
        print("unreachable", flush=True)

    report_snapshot = process = is_id_removed = report_unreachable


def spin(seconds: float, until: int) -> bool:
    """Hold the GIL: nothing here gives it up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if arrived() >= until:
            return True
    return False


message = Message(type=MessageType.APP, to=2, term=1, entries=(Entry(data=b"x" * 100),))
pipeline = Pipeline(
    2,
    [f"{'https' if files else 'http'}://127.0.0.1:{port}"],
    Raft(),
    member_id=1,
    cluster_id=1,
    credentials=credentials,
    # One worker, so that all of them have their connection: to dial takes the GIL.
    config=PipelineConfig(connections=1, queue_length=4096),
)
pipeline.start()
pipeline.send(message)
while not pipeline.status.is_active:
    time.sleep(0.001)
while pipeline.stats().in_flight or pipeline.stats().queued:
    time.sleep(0.001)
sys.setswitchinterval(1000)
base = arrived()

if mode == "queued":
    for _ in range(2000):
        pipeline.send(message)
    is_ok = spin(LONG_TIMEOUT, base + 2000)
    print("ok" if is_ok else f"{arrived() - base} of 2000 arrived", flush=True)
else:
    is_over = threading.Event()
    is_resting = threading.Event()

    def produce() -> None:
        while not is_over.is_set():
            for _ in range(1000):
                pipeline.send(message)
            is_resting.set()
            time.sleep(0)  # the one place where it should let go of the GIL
            is_resting.clear()

    producer = threading.Thread(target=produce)
    producer.start()
    verdict = "ok"
    cut_off = 0
    deadline = time.monotonic() + 4
    while cut_off < 10 and time.monotonic() < deadline:
        time.sleep(0)
        if is_resting.is_set():
            continue
        # The producer waits for the GIL in the middle of a send. What is in msgc must leave.
        cut_off += 1
        began = time.monotonic()
        queued = -1
        # A machine may be so busy that for a while nobody reads.
        while queued and time.monotonic() - began < LONG_TIMEOUT:
            seen, quiet_since = arrived(), time.monotonic()
            while time.monotonic() - quiet_since < 0.1:
                if arrived() != seen:
                    seen, quiet_since = arrived(), time.monotonic()
            queued = pipeline.stats().queued
        if queued:
            verdict = f"nothing moves with {queued} messages queued"
            break
    is_over.set()
    sys.setswitchinterval(0.005)
    producer.join()
    print(verdict, flush=True)
# What is in flight at stop is reported as unreachable, and rightly so.
while pipeline.stats().in_flight or pipeline.stats().queued:
    time.sleep(0.001)
pipeline.stop()
