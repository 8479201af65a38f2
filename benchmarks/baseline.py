"""The honest pure-Python pipeline: what one would write without this package.

A bounded ``queue.Queue``, four threads, protobuf's C encoder and a urllib3 pool, with etcd's
headers and the duties of a pipeline: failures are told to Raft, the books balance, ``stop`` drops
what is queued and counts it. It has the face of ``pipeline.Pipeline``, so that one driver and one
set of contract tests serve both. Nothing in it is slow on purpose: the headers are built once, a
connection is never dialled twice without need, and no lock is held while posting.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import urllib3

from pipeline.config import PipelineConfig
from pipeline.errors import UsageError
from pipeline.raft import Raft
from pipeline.stats import PipelineStats
from pipeline.types import MessageType, SendResult, SnapshotStatus

if TYPE_CHECKING:
    from pipeline.raftpb import raft_pb2

__all__ = ["BaselinePipeline"]

logger = logging.getLogger(__name__)


class BaselinePipeline:
    """Posts messages to one peer; parameters and results as in ``pipeline.Pipeline``.

    Parameters
    ----------
    urls : sequence of str
        Only the first is used: choosing among URLs is not what is measured.
    """

    def __init__(
        self,
        peer_id: int,
        urls: Sequence[str],
        raft: Raft,
        *,
        member_id: int,
        cluster_id: int,
        config: PipelineConfig | None = None,
    ) -> None:
        self._config = config or PipelineConfig()
        self._peer_id = peer_id
        self._raft = raft
        self._pool = urllib3.connection_from_url(
            urls[0],
            maxsize=self._config.connections,
            timeout=urllib3.Timeout(
                connect=self._config.dial_timeout_s, read=self._config.response_timeout_s
            ),
        )
        self._headers = {
            "User-Agent": "raft-pipeline-baseline",
            "Content-Type": "application/protobuf",
            "X-Etcd-Cluster-Id": f"{cluster_id:x}",
            "X-Min-Cluster-Version": "3.0.0",
            "X-Server-From": f"{member_id:x}",
            "X-Server-Version": "3.5.1",
        }
        self._msgc: queue.Queue[raft_pb2.Message | None] = queue.Queue(self._config.queue_length)
        self._threads: list[threading.Thread] = []
        self._started = False
        self._stopping = threading.Event()
        # Guards the counters below; they are written by the caller and by every worker.
        self._lock = threading.Lock()
        self._accepted = self._refused = self._sent = self._failed = self._dropped = 0
        self._in_flight = self._sent_bytes = 0

    def start(self) -> None:
        if self._started:
            raise UsageError("start: the pipeline was started already")
        self._started = True
        for n in range(self._config.connections):
            thread = threading.Thread(target=self._work, name=f"baseline-{n}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def send(self, message: raft_pb2.Message) -> SendResult:
        """Offer ``message`` without waiting. It must not be changed afterwards."""
        if not self._started:
            raise UsageError("send: the pipeline is not started")
        # The lock spans the put, so that `stats` never sees a message in no column or in two.
        with self._lock:
            if self._stopping.is_set():
                self._refused += 1
                return SendResult.STOPPED
            try:
                self._msgc.put_nowait(message)
            except queue.Full:
                self._refused += 1
                return SendResult.QUEUE_FULL
            self._accepted += 1
            return SendResult.ACCEPTED

    def stop(self) -> None:
        """Drop what is queued, wait for the posts in flight and end the threads.

        Nothing can cancel a post of urllib3 from outside: a peer that does not answer holds this
        up for ``response_timeout_s``.
        """
        with self._lock:
            if self._stopping.is_set():
                return
            self._stopping.set()
            while True:
                try:
                    self._msgc.get_nowait()
                except queue.Empty:
                    break
                self._dropped += 1
        for _ in self._threads:
            self._msgc.put(None)
        for thread in self._threads:
            thread.join()
        self._pool.close()

    def stats(self) -> PipelineStats:
        """The books. ``queued_bytes`` is 0: a plain queue does not know what it holds."""
        with self._lock:
            gone = self._sent + self._failed + self._dropped + self._in_flight
            return PipelineStats(
                offered=self._accepted + self._refused,
                accepted=self._accepted,
                refused=self._refused,
                sent=self._sent,
                failed=self._failed,
                dropped=self._dropped,
                queued=self._accepted - gone,
                in_flight=self._in_flight,
                sent_bytes=self._sent_bytes,
                queued_bytes=0,
            )

    def _work(self) -> None:
        while (message := self._msgc.get()) is not None:
            with self._lock:
                self._in_flight += 1
            sent_bytes = self._post(message)
            with self._lock:
                self._in_flight -= 1
                if sent_bytes is None:
                    self._failed += 1
                else:
                    self._sent += 1
                    self._sent_bytes += sent_bytes
            try:
                self._report(message, delivered=sent_bytes is not None)
            except Exception:  # a node that raises must not cost a worker
                logger.exception("a callback of Raft raised")

    def _post(self, message: raft_pb2.Message) -> int | None:
        """Bytes of the message when the peer answered 204, else None."""
        body = message.SerializeToString()
        try:
            answer = self._pool.urlopen(
                "POST", "/raft", body=body, headers=self._headers, retries=False, redirect=False
            )
        except (urllib3.exceptions.HTTPError, OSError):
            return None
        return len(body) if answer.status == 204 else None

    def _report(self, message: raft_pb2.Message, *, delivered: bool) -> None:
        if not delivered:
            self._raft.report_unreachable(message.to)
        if message.type == MessageType.SNAP:
            status = SnapshotStatus.FINISH if delivered else SnapshotStatus.FAILURE
            self._raft.report_snapshot(message.to, status)
