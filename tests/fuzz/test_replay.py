"""The inputs that libFuzzer has kept, and those that once broke something, without libFuzzer."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UnmarshalError
from pipeline.wire._frames import FrameReader, FrameWriter
from pipeline.wire._messages import EncodedMessage, Message
from tests.fuzz import build, oracles, receiver, targets, tls


@pytest.fixture(scope="module")
def machine_type(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    lacking = build.missing()
    if lacking is not None:
        pytest.skip(f"the machine cannot be built without {lacking}")
    path = build.build_machine(
        tmp_path_factory.mktemp("machine"), os.environ.get("PIPELINE_SANITIZE", "")
    )
    spec = importlib.util.spec_from_file_location("_machine", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with receiver.InternalErrors.watched():
        yield module.Machine


def replay(folder: Path, target: str, machine_type: Any = None) -> None:
    """Run the target on each input of a folder, which has some."""
    run = targets.load(target, machine_type)
    paths = sorted(folder.iterdir())
    assert paths
    for path in paths:
        data = path.read_bytes()
        try:
            run(data)
        except BaseException as error:
            error.add_note(f"on {path}, {data!r}")
            raise


PARSERS = ["message", "answer", "request", "stream_message", "stream_msgapp"]


@pytest.mark.parametrize("target", PARSERS)
def test_our_parsers_and_those_of_others_agree_on_every_kept_input(target: str) -> None:
    replay(targets.HERE / "corpus" / target, target)


def test_the_receiver_keeps_its_invariants_on_every_kept_script(machine_type: Any) -> None:
    replay(targets.HERE / "corpus" / "receiver", "receiver", machine_type)


def test_the_receiver_with_an_inbox_keeps_its_invariants_on_every_kept_script(
    machine_type: Any,
) -> None:
    replay(targets.HERE / "corpus" / "inbox", "inbox", machine_type)


def test_a_tls_session_keeps_its_word_on_every_kept_script() -> None:
    replay(targets.HERE / "corpus" / "tls", "tls")


REGRESSIONS = sorted((targets.HERE / "regressions").glob("*/*"))


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_once_broke_something_does_not_any_more(
    path: Path, request: pytest.FixtureRequest
) -> None:
    target = path.parent.name
    is_receiver = target in ("receiver", "inbox")
    machine_type = request.getfixturevalue("machine_type") if is_receiver else None
    targets.load(target, machine_type)(path.read_bytes())


# A target is worth its time if it notices a parser that is wrong.


def test_a_decoder_that_refuses_what_protobuf_reads_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(data: bytes) -> tuple[None, UnmarshalError]:
        return None, UnmarshalError("Message", 0, "no reason that is explained")

    oracles.check_message(b"\x08\x03")
    monkeypatch.setattr(oracles, "unmarshal", refuse)
    with pytest.raises(AssertionError):
        oracles.check_message(b"\x08\x03")


def test_a_decoder_that_reads_another_value_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    read = oracles.unmarshal
    monkeypatch.setattr(oracles, "unmarshal", lambda data: read(data.replace(b"\x03", b"\x04")))
    with pytest.raises(AssertionError):
        oracles.check_message(b"\x08\x03")


def test_a_recogniser_of_answers_that_ignores_a_body_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n"
    assert oracles.check_answer(data) == -1
    monkeypatch.setattr(oracles, "recognise_204", len)
    with pytest.raises(AssertionError):
        oracles.check_answer(data)


def test_a_recogniser_of_requests_that_ignores_chunks_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = b"POST /raft HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert not oracles.check_request(data)
    monkeypatch.setattr(
        oracles, "recognise_post", lambda head: (len(data), 0) if len(head) == len(data) else None
    )
    with pytest.raises(AssertionError):
        oracles.check_request(data)


class ReaderWithAFault(FrameReader):
    """Forgets which commit a message has."""

    def read(self) -> Message | EncodedMessage | None:
        message = super().read()
        if isinstance(message, Message):
            message.commit = 0
        return message


class WriterWithAFault(FrameWriter):
    """Writes each message as if it were the stream's first."""

    def write(self, message: Message | EncodedMessage, *, borrow_min: int = 0) -> bytes:
        return FrameWriter("msgapp", from_=1, to=2).write(message, borrow_min=borrow_min)


APPS = bytes.fromhex(
    "3f 01 0000000000000001 0000000000000002 1801 0000000000000001"
) + bytes.fromhex("01 0000000000000000 0000000000000001")


@pytest.mark.parametrize(
    ("name", "fault"), [("FrameReader", ReaderWithAFault), ("FrameWriter", WriterWithAFault)]
)
def test_an_end_of_a_stream_that_forgets_is_noticed(
    name: str, fault: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets.load("stream_msgapp")(APPS)
    monkeypatch.setattr(oracles, name, fault)
    with pytest.raises(AssertionError):
        targets.load("stream_msgapp")(APPS)


def test_a_session_that_reads_what_was_not_written_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = tls._read_all
    monkeypatch.setattr(tls, "_read_all", lambda session: read(session)[::-1])
    with pytest.raises(AssertionError):
        tls.run(bytes((7, 0, 0, 1, 2)))
