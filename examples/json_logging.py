"""Logs as JSON, one object a line, with Python's own ``logging``.

::

    python -m pipeline.examples.json_logging

The library's records have fields, as attributes: who it is about, where, and why. A formatter takes
those that say something; what other libraries log has none, and is written all the same. The
program sends a message to a peer that is not there, so that there is something to log.
"""

from __future__ import annotations

import json
import logging
import queue
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener

from pipeline import Message, MessageType, SnapshotStatus, Transport

__all__ = ["FIELDS", "JSONFormatter", "main"]

#: docs/operations.md says what they are.
FIELDS = ("local", "peer", "url", "channel", "address", "reason", "verdict")


class JSONFormatter(logging.Formatter):
    """Writes a record as an object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {"time": at, "level": record.levelname.lower()}
        line |= {"logger": record.name, "message": record.getMessage()}
        for name in FIELDS:
            if (value := getattr(record, name, None)) is not None:
                line[name] = value
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class Reports:
    """What becomes of messages (``pipeline.Raft``): this program only waits for a failure."""

    def __init__(self) -> None:
        self.failures: queue.SimpleQueue[int] = queue.SimpleQueue()

    def process(self, message: Message) -> None: ...
    def is_id_removed(self, member_id: int) -> bool:
        return False

    def report_unreachable(self, member_id: int) -> None:
        self.failures.put(member_id)

    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None: ...


def main() -> None:
    """Log what becomes of a message to a port where nobody is."""
    # A handler that blocks would hold up the library's threads: this one only puts into a queue,
    # and formats before it does, for the traceback does not come through.
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = QueueHandler(lines)
    handler.setFormatter(JSONFormatter())
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    writer = QueueListener(lines, logging.StreamHandler())
    writer.start()
    reports = Reports()
    with Transport(0xA1, 7, reports) as transport:
        transport.add_peer(0xB2, ["http://127.0.0.1:1"])
        transport.send([Message(type=MessageType.HEARTBEAT, to=0xB2, from_=0xA1, term=1)])
        reports.failures.get(timeout=60)
    writer.stop()


if __name__ == "__main__":
    main()
