"""The asyncio face: the same Transport, its callbacks delivered on the event loop.

A thread of the library that has something for the node leaves it on the loop and waits for the
outcome, as it would wait in a blocking callback. So nothing queues up that is not held by a
waiting thread: a loop that is stuck makes peers wait and grows nothing.
"""

from pipeline.aio.inbox import Inbox
from pipeline.aio.listener import Listener
from pipeline.aio.raft import Raft, RaftReports
from pipeline.aio.transfer import SnapshotTransfer
from pipeline.aio.transport import Transport

__all__ = ["Inbox", "Listener", "Raft", "RaftReports", "SnapshotTransfer", "Transport"]
