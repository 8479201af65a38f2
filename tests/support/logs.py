"""A log handler that does what ours must survive."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


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
