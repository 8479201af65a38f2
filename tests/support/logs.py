"""A log handler that does what ours must survive, and what every record is to have."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator

from pipeline.logs import FIELDS


class _Raising(logging.Handler):
    def __init__(self, text: str, error: type[BaseException]) -> None:
        super().__init__(logging.DEBUG)
        self.text = text
        self.error = error
        self.raised = 0

    def emit(self, record: logging.LogRecord) -> None:
        if self.text in record.getMessage():
            self.raised += 1
            raise self.error("the log handler")


@contextlib.contextmanager
def handler_that_raises(text: str, error: type[BaseException] = SystemExit) -> Iterator[_Raising]:
    """Log to a handler that raises at records with ``text`` in them; it counts how often."""
    handler = _Raising(text, error)
    logger = logging.getLogger("pipeline")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


#: Lines that name a member, by what is put in for it.
_ABOUT_A_PEER = re.compile(
    r"\b(?:peer|remote|member|Raft message of|stream of|snapshot of|bytes to|sent to|snapshot to)"
    r" %s|^peer (?:became|was|deactivated)"
)
#: Lines of what was dialled, and did not work.
_DIALLED = re.compile(r"failed to (?:dial|write \w+ on pipeline|post)|^probe of peer")


def faults_of(record: logging.LogRecord) -> list[str]:
    """Tell what a record of the library's lacks of the fields that it is to have."""
    if missing := [name for name in FIELDS if not hasattr(record, name)]:
        return [f"has no {', '.join(missing)}"]
    fields = {name: getattr(record, name) for name in FIELDS}
    faults = [
        f"{name} is {value!r}"
        for name, value in fields.items()
        if value is not None and (not isinstance(value, str) or value == "")
    ]
    if _ABOUT_A_PEER.search(record.msg) and fields["peer"] is None:
        faults.append("is about a peer and does not say which")
    if record.levelno >= logging.WARNING and not (fields["reason"] or record.exc_info):
        faults.append("does not say why")
    if (fields["reason"] is None) != (fields["verdict"] is None):
        faults.append("has a reason or a verdict alone")
    is_ours = re.match("stopped|internal error", fields["reason"] or "")
    if not is_ours and _DIALLED.search(record.getMessage()):
        faults += ["does not say where"] * (fields["url"] is None)
    return faults


class FieldsWatch(logging.Handler):
    """Notes what the library's records lack, each with its line."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        # Not what a test logs itself, nor the nodes of examples.
        if record.name in sys.modules and not record.name.startswith("pipeline.examples."):
            self.faults += [f"{fault}: {record.getMessage()}" for fault in faults_of(record)]
