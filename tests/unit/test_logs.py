"""``pipeline.logs``: logging raises nothing, hides nothing, and tells a flood once a second."""

from __future__ import annotations

import importlib
import logging
import pkgutil
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeline
from pipeline.logs import FIELDS, Logger, Throttle, get_logger, lost_lines, show
from tests.support.logs import faults_of

NAME = "pipeline.tested"
ENDINGS = [ValueError, RecursionError, SystemExit, KeyboardInterrupt, GeneratorExit]


class Rude:
    """Cannot be shown."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __repr__(self) -> str:
        raise self.error

    __str__ = __repr__


class _Handler(logging.Handler):
    """Formats what comes, as handlers do, and lets everything through that this raises."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def handler() -> Iterator[_Handler]:
    handler = _Handler()
    logger = logging.getLogger(NAME)
    logger.addHandler(handler)
    logger.propagate = False
    yield handler
    logger.propagate = True
    logger.removeHandler(handler)
    logger.filters.clear()
    logger.setLevel(logging.NOTSET)


def in_thread(log: Logger, *args: object) -> list[str]:
    """Log in a thread of its own while it handles something; what it came to."""
    done: list[str] = []

    def run() -> None:
        try:
            int("no number")
        except ValueError:
            log.exception("text %r", *args)
            done.append("went on")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return done


@pytest.mark.parametrize("error", ENDINGS)
@pytest.mark.parametrize("culprit", ["handler", "filter", "formatter", "argument"])
def test_a_thread_that_logs_goes_on_whatever_logging_raises(
    handler: _Handler,
    monkeypatch: pytest.MonkeyPatch,
    culprit: str,
    error: type[BaseException],
) -> None:
    def fail(*_: object) -> bool:
        raise error

    argument: object = 1
    if culprit == "handler":
        monkeypatch.setattr(handler, "emit", fail)
    elif culprit == "filter":
        logging.getLogger(NAME).addFilter(fail)
    elif culprit == "formatter":
        monkeypatch.setattr(handler, "format", fail)
    else:
        argument = Rude(error)
    before = lost_lines()
    assert in_thread(get_logger(NAME), argument) == ["went on"]
    assert lost_lines() == before + 1


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_the_main_thread_may_be_interrupted_while_it_logs(
    handler: _Handler, error: type[BaseException]
) -> None:
    before = lost_lines()
    with pytest.raises(error):
        get_logger(NAME).warning("%r", Rude(error))
    get_logger(NAME).warning("%r", Rude(ValueError))
    assert lost_lines() == before + 1


def test_every_module_logs_through_this_one() -> None:
    folder = Path(pipeline.__file__).parent
    for path in folder.rglob("*.py*"):
        is_ours = path.name != "logs.py" and path.parent.name != "examples"
        if path.suffix in (".py", ".pyx") and is_ours:
            text = path.read_text().replace("logging.getLogger(__name__).addHandler", "")
            assert "logging.getLogger" not in text, path
    names = set()
    for found in pkgutil.walk_packages(pipeline.__path__, "pipeline."):
        if found.name.startswith("pipeline.examples."):
            continue  # an application's own
        module = importlib.import_module(found.name)
        if (logger := getattr(module, "logger", None)) is not None:
            assert isinstance(logger, Logger)
            names.add(logger._logger.name)
    assert {"pipeline.node", "pipeline.send.status", "pipeline.receive.listener"} <= names
    assert all(re.fullmatch(r"pipeline(\.[a-z_]+)+", name) for name in names)


def test_a_line_names_the_place_it_comes_from(caplog: pytest.LogCaptureFixture) -> None:
    log = get_logger(NAME)
    caplog.set_level(logging.DEBUG, NAME)
    log.debug("%d", 1)
    log.info("%d", 2)
    log.warning("%d", 3)
    log.error("%d", 4)
    log.exception("%d", 5)
    log.log(logging.INFO, "%d", 6)
    Throttle(log).warning("%d", 7)
    Throttle(log).error("%d", 8)
    assert caplog.messages == list("12345678")
    first = caplog.records[0].lineno
    assert [record.lineno - first for record in caplog.records] == list(range(8))
    assert {(record.name, record.filename) for record in caplog.records} == {(NAME, "test_logs.py")}


def test_a_line_that_is_not_logged_shows_nothing(handler: _Handler) -> None:
    logging.getLogger(NAME).setLevel(logging.ERROR)
    before = lost_lines()
    log = get_logger(NAME)
    log.debug("%r", Rude(ValueError))
    log.info("%r", Rude(ValueError))
    Throttle(log).warning("%r", Rude(ValueError))
    assert (handler.lines, lost_lines()) == ([], before)


def test_a_text_is_let_pass_once_a_second(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG, NAME)
    now = 100.0
    monkeypatch.setattr("pipeline.logs.time.monotonic", lambda: now)
    throttle = Throttle(get_logger(NAME))

    def levels() -> list[str]:
        caplog.clear()
        throttle.warning("one %d", 1)
        throttle.warning("one %d", 2)
        throttle.error("two")
        return [record.levelname for record in caplog.records]

    assert levels() == ["WARNING", "DEBUG", "ERROR"]
    assert levels() == ["DEBUG"] * 3
    now += 1.0
    assert levels() == ["WARNING", "DEBUG", "ERROR"]
    assert len(throttle._next) == 2


@pytest.mark.parametrize("error", [ValueError, RecursionError])
def test_whatever_is_shown_is_shown(error: type[BaseException]) -> None:
    assert show(1) == "1"
    assert show(Rude(error)) == f"<Rude that raises {error.__name__} when it is shown>"
    assert show("x" * 1000) == "'" + "x" * 199 + "..."


# -- fields


def test_a_record_has_every_field_and_none_for_what_there_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = get_logger(NAME).about(local="a1", peer="b2")
    log.warning("%d", 1, url="http://b", reason="b: Connection refused")
    Throttle(log.about(channel="pipeline")).error("%d", 2, peer="c3")
    log.info("%d", 3)  # not logged
    get_logger(NAME).warning("%d", 4, reason="stopped", verdict="of its own")
    found = [{name: getattr(record, name) for name in FIELDS} for record in caplog.records]
    nothing = dict.fromkeys(FIELDS)
    refused = {"reason": "b: Connection refused", "verdict": "refused"}
    assert found == [
        {**nothing, "local": "a1", "peer": "b2", "url": "http://b", **refused},
        {**nothing, "local": "a1", "peer": "c3", "channel": "pipeline"},
        {**nothing, "reason": "stopped", "verdict": "of its own"},
    ]


def test_no_field_is_what_logging_calls_something_of_its_own() -> None:
    record = logging.LogRecord(NAME, logging.INFO, __file__, 1, "text", (), None)
    assert not set(FIELDS) & {*vars(record), "message", "asctime", "taskName"}


def test_a_program_that_has_a_field_of_that_name_keeps_it_and_loses_no_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    make = logging.getLogRecordFactory()

    def with_peer(*args: Any, **more: Any) -> logging.LogRecord:
        record = make(*args, **more)
        record.peer = "the program's"
        return record

    before = lost_lines()
    logging.setLogRecordFactory(with_peer)
    try:
        get_logger(NAME).warning("%d", 1, peer="b2", reason="stopped")
    finally:
        logging.setLogRecordFactory(make)
    (record,) = caplog.records
    assert (record.getMessage(), record.peer, lost_lines()) == ("1", "the program's", before)  # type: ignore[attr-defined]
    assert not hasattr(record, "reason")


def test_a_line_that_is_not_logged_is_not_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> None:
        raise AssertionError("explained")

    monkeypatch.setattr("pipeline.logs.explanation_of", fail)
    before = lost_lines()
    get_logger(NAME).debug("%s", "b2", peer="b2", reason="stopped")
    assert lost_lines() == before
    get_logger(NAME).warning("%s", "b2", peer="b2", reason="stopped")
    assert lost_lines() == before + 1


@pytest.mark.parametrize(
    ("line", "fields", "fault"),
    [
        ("peer became inactive", {"reason": "x"}, "is about a peer"),
        ("dropped to peer %s", {"reason": "x"}, "is about a peer"),
        ("what %s", {"peer": "b2"}, "does not say why"),
        ("what %s", {"reason": "x", "url": 7}, "url is 7"),
        ("what %s", {"url": "", "reason": "x"}, "url is ''"),
        ("failed to dial %s on stream", {"peer": "b2", "reason": "x"}, "does not say where"),
        ("what %s", {"peer": "b2", "reason": "x"}, ""),
    ],
)
def test_what_a_record_lacks_is_seen(
    caplog: pytest.LogCaptureFixture, line: str, fields: dict[str, Any], fault: str
) -> None:
    get_logger(NAME).warning(line, *["b2"] * line.count("%s"), **fields)
    (record,) = caplog.records
    found = faults_of(record)
    assert len(found) == (1 if fault else 0)
    assert "".join(found).startswith(fault)


def test_a_record_without_fields_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger(NAME).warning("plain")
    assert faults_of(caplog.records[0]) == [f"has no {', '.join(FIELDS)}"]
