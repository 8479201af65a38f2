"""The core of streams beside a peer that does what it likes, and at its end in every state."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
import traceback
from collections import Counter

import pytest

from pipeline import Message, MessageType, SendResult, UsageError
from pipeline.stream._streams import Writer, error_text
from pipeline.wire._frames import FrameReader, FrameWriter
from tests.support import LONG_TIMEOUT, MIB, SHORT_TIMEOUT
from tests.support.frames import plain, u64
from tests.support.senders import assert_balanced
from tests.support.stream_core import (
    HEAD,
    LAST_CHUNK,
    MEMBER,
    PEER,
    Lines,
    Node,
    OurReader,
    append,
    chunk,
    outgoing,
)
from tests.support.waiting import eventually, exit_status_of, until_read

SILENT = "i/o timeout"
REFUSAL = b"HTTP/1.1 502 Bad Gateway\r\nTransfer-Encoding: chunked\r\n\r\n"
STALLED = "stalled: no byte could be written within the stall timeout"


def frames(*messages: Message, kind: str = "msgapp") -> bytes:
    writer = FrameWriter(kind, from_=PEER, to=MEMBER)
    return b"".join(writer.write(message) for message in messages)


def proposal(data: bytes) -> Message:
    message = append(0, data)
    message.type = MessageType.PROP
    return message


# -- reading


def test_a_stream_may_be_cut_at_any_byte() -> None:
    sent = [append(i, b"x" * i) for i in range(3)]
    whole = frames(*sent)
    data = b"".join(chunk(whole[i : i + 7]) for i in range(0, len(whole), 7))
    with Node() as node:
        reader, lines = node.up()
        for cut in range(len(data)):
            lines.peer.sendall(data[:cut])
            until_read(lines.peer)
            lines.peer.sendall(data[cut:])
            # Each time the first frame sets term and index anew: it is of kind 02.
            assert node.taken(3) == sent
        lines.peer.sendall(LAST_CHUNK)
        assert reader.lost.get(timeout=LONG_TIMEOUT) == error_text(0)
        assert reader.stats()[0] == 3 * len(data)


@pytest.mark.parametrize("kind", ["msgapp", "message"])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (chunk(b"\x03"), "a frame that is none"),
        (chunk(b"\x01" + u64(1 << 40)), "a frame that is none"),
        (chunk(b"\x02" + u64((512 << 20) + 1)), "a frame that is none"),
        (chunk(b"\x02" + u64(3) + b"\xff\xff\xff"), "a frame that is none"),
        (chunk(b"\x01" + u64(1) + u64(1 << 63)), "a frame that is none"),
        (chunk(b"\x02\0\0") + LAST_CHUNK, "what was read is no chunk"),
        (b"zz\r\n", "what was read is no chunk"),
        (b"\r\n", "what was read is no chunk"),
        (b"1;x=y\r\n", "what was read is no chunk"),
        (b"fffffffff\r\n", "what was read is no chunk"),
        (chunk(b"\0")[:-2] + b"xx", "what was read is no chunk"),
        (LAST_CHUNK, "EOF"),
    ],
)
def test_what_is_no_stream_ends_it(kind: str, data: bytes, reason: str) -> None:
    if kind == "message" and data[3:4] in (b"\1", b"\2", b"\3") and b";" not in data:
        data = chunk(u64((512 << 20) + 1)) if reason.startswith("a frame") else data
    with Node() as node:
        reader, lines = node.up(kind)
        lines.peer.sendall(data)
        assert reader.lost.get(timeout=LONG_TIMEOUT) == reason
        assert lines.read_to_end() == b""
        assert reader.stats()[0] == 0


def test_a_frame_of_512_mib_announced_is_no_memory_until_it_comes() -> None:
    with Node() as node:
        reader, lines = node.up("message")
        lines.peer.sendall(chunk(u64(512 << 20) + b"\x08\x03"))
        until_read(lines.peer)
        assert reader.state == "up"
        lines.peer.close()
        assert reader.lost.get(timeout=LONG_TIMEOUT) == "unexpected EOF"


def test_the_end_of_a_connection_within_a_frame_is_no_end_in_good_order() -> None:
    data = frames(append(0))
    with Node() as node:
        reader, lines = node.up(is_chunked=False)
        lines.peer.sendall(data + data[:5])
        lines.peer.close()
        assert reader.lost.get(timeout=LONG_TIMEOUT) == "unexpected EOF"
        assert node.taken(1) == [append(0)]


def test_what_came_right_behind_the_head_is_read_at_once() -> None:
    with Node() as node:
        node.up(behind=chunk(frames(append(7))))
        began = time.monotonic()
        assert node.taken(1) == [append(7)]
        assert time.monotonic() - began < 4  # not with the next thing that happens: the silence


def test_a_reader_waits_for_room_and_loses_nothing() -> None:
    sent = [append(i, b"x" * 100) for i in range(2000)]
    with Node(max_messages=3) as node:
        reader, lines = node.up()
        data = frames(*sent)
        sender = threading.Thread(target=lambda: lines.peer.sendall(chunk(data) + LAST_CHUNK))
        sender.start()
        taken = [message.index for _ in sent for message in node.taken(1)]
        sender.join(LONG_TIMEOUT)
        assert taken == list(range(2000))
        assert reader.lost.get(timeout=LONG_TIMEOUT) == error_text(0)


def test_what_is_no_chunk_ends_a_stream_although_it_waits_for_room() -> None:
    with Node(max_messages=1) as node:
        reader, lines = node.up()
        lines.peer.sendall(chunk(frames(append(0), append(1), append(2))) + b"zz\r\n")
        until_read(lines.peer)
        assert [message.index for message in node.taken(3)] == [0, 1, 2]
        # What follows would be read as a chunk by whoever has passed over the bytes before it.
        lines.peer.sendall(chunk(frames(append(3))))
        assert reader.lost.get(timeout=LONG_TIMEOUT) == "what was read is no chunk"
        assert reader.stats()[0] == 3


@pytest.mark.parametrize("drops", [True, False])
def test_proposals_without_room_are_dropped_or_wait(drops: bool) -> None:
    with Node(drops_proposals=drops, max_messages=2) as node:
        reader, lines = node.up("message")
        proposals = [proposal(b"%d" % i) for i in range(5)]
        beat = Message(type=MessageType.HEARTBEAT, from_=PEER, to=MEMBER, term=1)
        lines.peer.sendall(chunk(frames(*proposals, beat, kind="message")))
        if drops:
            eventually(lambda: reader.stats()[4] == 3, "three are dropped")
            assert node.taken(3) == [*proposals[:2], beat]
            assert reader.stats()[4] == 3
        else:
            assert node.taken(6) == [*proposals, beat]
            assert reader.stats()[4] == 0


def test_large_frames_share_what_there_is_of_memory() -> None:
    data = os.urandom(3 * MIB)
    with Node(budget=MIB) as node:
        readers = [node.up() for _ in range(3)]
        senders = [
            threading.Thread(
                target=lines.peer.sendall, args=(chunk(frames(append(i, data), append(i + 10))),)
            )
            for i, (_, lines) in enumerate(readers)
        ]
        for sender in senders:
            sender.start()
        taken = node.taken(6)
        for sender in senders:
            sender.join(LONG_TIMEOUT)
        assert sorted(message.index for message in taken) == [0, 1, 2, 10, 11, 12]
        assert all(
            message.entries[0].data == (data if message.index < 10 else b"") for message in taken
        )


def test_a_large_frame_that_is_broken_off_makes_room_for_another() -> None:
    data = os.urandom(3 * MIB)
    with Node(budget=MIB) as node:
        (first, first_lines), (_, second_lines) = node.up(), node.up()
        frame = frames(append(1, data))
        first_lines.peer.sendall(b"%x\r\n" % len(frame) + frame[: 2 * MIB])
        until_read(first_lines.peer)
        sender = threading.Thread(target=second_lines.peer.sendall, args=(chunk(frame),))
        sender.start()
        first_lines.peer.close()
        assert first.lost.get(timeout=LONG_TIMEOUT) == "unexpected EOF"
        assert node.taken(1)[0].entries[0].data == data
        sender.join(LONG_TIMEOUT)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "unexpected EOF"),
        (b"HTTP/1.1 200 OK\r\n", "unexpected EOF"),
        (b"x" * (16 << 10), "the head of the answer does not end"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "EOF"),
    ],
)
def test_an_answer_that_is_refused_leaves_nothing_open(answer: bytes, reason: str) -> None:
    with Node() as node:
        reader, lines = node.asking()
        lines.peer.sendall(answer)
        if reason == "unexpected EOF":
            lines.peer.shutdown(1)
        assert reader.heads.get(timeout=LONG_TIMEOUT) == (answer, reason)
        reader.refuse()
        assert lines.read_to_end() == b""
        eventually(lambda: reader.state == "down")
        reader.dial_after(0)
        reader.dials.get(timeout=LONG_TIMEOUT)


def refused(node: Node, behind: bytes, wait_s: float = LONG_TIMEOUT) -> tuple[OurReader, Lines]:
    """Return a reader that waits for the end of a refusal, some of which is ``behind`` its head."""
    reader, lines = node.asking()
    lines.peer.sendall(REFUSAL + behind)
    assert reader.heads.get(timeout=LONG_TIMEOUT)[0].startswith(REFUSAL)
    is_chunked = not behind.startswith(b"x")
    reader.wait_refused(len(REFUSAL), is_chunked=is_chunked, wait_s=wait_s)
    return reader, lines


@pytest.mark.parametrize("piece", [b"x" * 300000, chunk(b"x" * 300000)], ids=["bytes", "chunks"])
def test_a_refusal_without_an_end_is_waited_for(piece: bytes) -> None:
    with Node() as node:
        reader, lines = refused(node, piece[:1])
        lines.peer.sendall(piece[1:])
        until_read(lines.peer)
        assert reader.state == "refused"
        assert reader.dials.empty()
        lines.peer.close()
        reader.dials.get(timeout=LONG_TIMEOUT)


@pytest.mark.parametrize(
    ("behind", "later"),
    [
        pytest.param(chunk(b"bad gateway") + LAST_CHUNK, b"", id="the last chunk, at once"),
        pytest.param(chunk(b"bad gateway"), LAST_CHUNK, id="the last chunk, later"),
        pytest.param(b"4\r\nlo", b"ng zz", id="no chunk"),
        pytest.param(b"x", b"x" * (2 << 20), id="too much"),
        pytest.param(b"4\r\nlong\r\n", chunk(b"x") * (200 << 10), id="too much in chunks"),
    ],
)
def test_a_refusal_has_ended_though_its_connection_stays(behind: bytes, later: bytes) -> None:
    """As a proxy answers that has nobody behind it."""
    with Node() as node:
        reader, lines = refused(node, behind)
        with contextlib.suppress(OSError):  # it may have ended already
            lines.peer.sendall(later)
        reader.dials.get(timeout=LONG_TIMEOUT)
        assert lines.read_to_end() == b""


def test_a_refusal_is_waited_for_so_long_and_no_longer() -> None:
    with Node() as node:
        reader, _lines = refused(node, chunk(b"x"), wait_s=SHORT_TIMEOUT)
        reader.dials.get(timeout=LONG_TIMEOUT)


@pytest.mark.slow  # five seconds of silence
def test_a_refusal_that_falls_silent_has_ended() -> None:
    with Node() as node:
        reader, lines = refused(node, chunk(b"x"))
        began = time.monotonic()
        reader.dials.get(timeout=LONG_TIMEOUT)
        assert time.monotonic() - began > 4.0
        assert lines.read_to_end() == b""


# -- writing


def test_of_connections_attached_at_once_one_is_left() -> None:
    with Node() as node:
        writer = node.writer()
        lines = [Lines() for _ in range(8)]
        threads = [
            threading.Thread(
                target=lambda line=line: writer.attach(line.ours, HEAD, is_chunked=True)
            )
            for line in lines
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG_TIMEOUT)
        poller = select.poll()
        for line in lines:
            poller.register(line.peer, select.POLLRDHUP)
        eventually(lambda: len(poller.poll(0)) == 7, "seven are ended")
        ended = {fd for fd, _ in poller.poll(0)}
        (left,) = [line for line in lines if line.peer.fileno() not in ended]
        assert left.peer.recv(len(HEAD)) == HEAD
        for line in lines:
            if line is not left:  # either it was never taken over, or it ends in good order
                received = line.read_to_end()
                assert received == b"" or received.startswith(HEAD)
                assert received == b"" or received.endswith(LAST_CHUNK)


def test_books_balance_at_every_instant_while_peers_come_and_go() -> None:
    results: Counter[SendResult | None] = Counter()
    has_ended = threading.Event()
    with Node() as node:
        writer, _ = node.attached(queue_length=64)
        channels = node.channels(writer)

        def offer() -> None:
            for index in range(20000):
                if writer.working:
                    results[channels.send(outgoing(index, b"x" * (index % 64)))] += 1
            has_ended.set()

        thread = threading.Thread(target=offer)
        thread.start()
        while not has_ended.is_set():
            lines = Lines()
            assert writer.attach(lines.ours, HEAD, is_chunked=True)
            lines.peer.settimeout(0.01)
            for _ in range(20):
                try:
                    lines.peer.recv(1 << 16)
                except TimeoutError:
                    break
                assert_balanced(writer.stats())
            lines.peer.close()
        thread.join(LONG_TIMEOUT)
        books = writer.stats()
        assert_balanced(books)
        assert 0 < books.offered <= results.total()


def test_what_is_not_read_for_five_seconds_is_lost_and_silence_too() -> None:
    data = b"x" * MIB
    with Node() as node:
        # Both at once: each takes its five seconds.
        began = time.monotonic()
        reader, lines = node.up()
        writer, deaf = node.attached(receive_buffer=4096)
        channels = node.channels(writer)
        for index in range(20):
            assert channels.send(outgoing(index, data)) is SendResult.ACCEPTED
        assert_balanced(writer.stats())
        assert writer.stats().queued + writer.stats().in_flight > 0
        assert reader.lost.get(timeout=LONG_TIMEOUT) == SILENT
        assert time.monotonic() - began >= 5
        reason, lost = writer.lost.get(timeout=LONG_TIMEOUT)
        assert reason == STALLED
        assert lost > 0
        assert time.monotonic() - began >= 5
        books = writer.stats()
        assert_balanced(books)
        assert (books.failed, books.queued, books.in_flight) == (lost, 0, 0)
        assert not writer.working
        assert deaf.peer.recv(5)
        assert lines.read_to_end() == b""


@pytest.mark.parametrize("kind", ["msgapp", "message"])
def test_heartbeats_come_on_their_tick(kind: str) -> None:
    with Node() as node:
        writer, lines = node.attached(kind)
        beat = FrameWriter(kind, from_=MEMBER, to=PEER).heartbeat()
        expected = chunk(beat)
        received = b""
        while len(received) < 2 * len(expected):
            received += lines.peer.recv(1000)
        assert received == 2 * expected
        began = time.monotonic()
        writer.renew()
        assert lines.read_to_end() == LAST_CHUNK
        assert time.monotonic() - began < LONG_TIMEOUT
        assert writer.lost.get(timeout=LONG_TIMEOUT) == (error_text(0), 0)


def written(peer: socket.socket, count: int) -> list[Message]:
    """Read so many messages of what a writer writes."""
    reader = FrameReader("msgapp", from_=MEMBER, to=PEER)
    left = b""
    found: list[Message] = []
    while len(found) < count:
        left += peer.recv(1 << 20)
        while b"\r\n" in left:
            size = int(left[: left.index(b"\r\n")], 16)
            begin = left.index(b"\r\n") + 2
            if len(left) < begin + size + 2:
                break
            reader.feed(left[begin : begin + size])
            left = left[begin + size + 2 :]
        while (message := reader.read()) is not None:
            if message.type == MessageType.APP:
                found.append(plain(message))
    return found


def test_messages_of_all_sizes_arrive_whole_and_in_order() -> None:
    sizes = [0, 1, 4000, 4096, 16 << 10, 64 << 10, 5 * MIB, 10, 200, 3 * MIB, 0]
    with Node() as node:
        writer, lines = node.attached()
        channels = node.channels(writer)
        datas = [os.urandom(size) for size in sizes]
        for index, data in enumerate(datas):
            assert channels.send(outgoing(index, data)) is SendResult.ACCEPTED
        found = written(lines.peer, len(sizes))
        assert [bytes(each.entries[0].data or b"") for each in found] == datas
        eventually(lambda: writer.stats().sent == len(sizes))
        assert_balanced(writer.stats())


# -- by the caller: a message that comes alone


def rest() -> None:
    """Let a writer be without work for long enough to be lent."""
    time.sleep(0.001)


def test_a_message_that_comes_alone_is_written_when_send_returns() -> None:
    with Node() as node:
        writer, lines = node.attached()
        channels = node.channels(writer)
        at_once = 0
        for index in range(100):
            eventually(lambda before=index: writer.stats().sent == before)
            rest()
            assert channels.send(outgoing(index)) is SendResult.ACCEPTED
            at_once += writer.stats().sent == index + 1
        assert at_once > 90  # but for those that meet a heartbeat
        assert [each.index for each in written(lines.peer, 100)] == list(range(100))


def test_what_a_caller_writes_stays_in_order_with_what_the_loop_writes() -> None:
    count = 20000
    found: list[Message] = []
    with Node() as node:
        writer, lines = node.attached()
        channels = node.channels(writer)
        thread = threading.Thread(target=lambda: found.extend(written(lines.peer, count)))
        thread.start()
        for index in range(count):
            if index % 8 == 0:
                time.sleep(0)
                until = time.perf_counter_ns() + index % 97 * 1000
                while time.perf_counter_ns() < until:
                    pass
            while channels.send(outgoing(index)) is not SendResult.ACCEPTED:
                rest()
        thread.join(LONG_TIMEOUT)
        assert [each.index for each in found] == list(range(count))
        eventually(lambda: writer.stats().sent == count)


def test_what_the_socket_does_not_take_of_it_is_left_to_the_loop() -> None:
    data = os.urandom(3000)
    with Node() as node:
        writer, lines = node.attached(receive_buffer=4096)
        channels = node.channels(writer)
        sent = 0
        while writer.stats().sent == sent:
            rest()
            assert channels.send(outgoing(sent, data)) is SendResult.ACCEPTED
            sent += 1
        found = written(lines.peer, sent)
        assert [each.index for each in found] == list(range(sent))
        assert all(each.entries[0].data == data for each in found)
        eventually(lambda: writer.stats().sent == sent)


def test_what_the_socket_never_takes_of_it_ends_the_stream() -> None:
    with Node() as node:
        writer, _ = node.attached(receive_buffer=4096)
        channels = node.channels(writer)
        sent = 0
        while writer.stats().sent == sent:
            rest()
            assert channels.send(outgoing(sent, b"x" * 3000)) is SendResult.ACCEPTED
            sent += 1
        reason, lost = writer.lost.get(timeout=LONG_TIMEOUT)
        assert (reason, lost) == (STALLED, 1)


def test_when_the_connection_is_gone_it_fails_once() -> None:
    for _ in range(20):
        with Node() as node:
            writer, lines = node.attached()
            channels = node.channels(writer)
            rest()
            lines.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            lines.peer.close()
            by_stream = channels.name_for(outgoing(0)) == "msgapp"
            assert channels.send(outgoing(0)) is SendResult.ACCEPTED
            _, lost = writer.lost.get(timeout=LONG_TIMEOUT)
            books = writer.stats()
            assert_balanced(books)
            assert books.failed == lost == books.offered - books.sent
            assert by_stream or books.offered == 0
            assert writer.lost.empty()


def test_it_may_be_written_while_the_stream_is_renewed_or_stops() -> None:
    with Node() as node:
        writer, _ = node.attached()
        channels = node.channels(writer)
        has_ended = threading.Event()

        def offer() -> None:
            while not has_ended.is_set():
                time.sleep(0.0001)
                channels.send(outgoing(0))

        threads = [threading.Thread(target=offer) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(100):
            lines = Lines()
            assert writer.attach(lines.ours, HEAD, is_chunked=True)
            eventually(lambda: writer.working)
            rest()
            writer.renew()
            assert lines.read_to_end().endswith(LAST_CHUNK)
            assert_balanced(writer.stats())
        last = Lines()
        assert writer.attach(last.ours, HEAD, is_chunked=True)
        eventually(lambda: writer.working)
        writer.begin_stop()
        assert writer.wait_stopped(LONG_TIMEOUT)
        has_ended.set()
        for thread in threads:
            thread.join(LONG_TIMEOUT)
        books = writer.stats()
        assert_balanced(books)
        assert (books.queued, books.in_flight) == (0, 0)
        last.read_to_end()


# -- the end


@pytest.mark.parametrize(
    "state", ["new", "down", "dialling", "asking", "judged", "up", "waiting", "refused"]
)
def test_a_reader_stops_in_every_state(state: str) -> None:
    with Node(max_messages=1) as node:
        lines = None
        if state in ("new", "down", "dialling"):
            reader = node.reader()
            if state == "down":
                reader.dial_after(LONG_TIMEOUT)
            elif state == "dialling":
                reader.dial_after(0)
                reader.dials.get(timeout=LONG_TIMEOUT)
        elif state in ("up", "waiting"):
            reader, lines = node.up()
            if state == "waiting":
                lines.peer.sendall(chunk(frames(append(0), append(1), append(2))))
                until_read(lines.peer)
        else:
            reader, lines = node.asking()
            if state != "asking":
                lines.peer.sendall(HEAD)
                reader.heads.get(timeout=LONG_TIMEOUT)
            if state == "refused":
                reader.wait_refused(len(HEAD), is_chunked=True, wait_s=LONG_TIMEOUT)
                eventually(lambda: reader.state == "refused")
        began = time.monotonic()
        reader.begin_stop()
        assert reader.wait_stopped(LONG_TIMEOUT)
        assert time.monotonic() - began < LONG_TIMEOUT / 2
        assert reader.lost.empty()
        if lines is not None:
            lines.read_to_end()
        late = Lines()
        if state == "dialling":  # the dial comes to its end only now
            assert not reader.connect(late.ours, b"GET")
            assert late.read_to_end() == b""
        reader.dial_after(0)
        reader.accept(0, is_chunked=True)
        reader.refuse()
        reader.renew()
        time.sleep(SHORT_TIMEOUT)
        assert reader.dials.empty()


@pytest.mark.parametrize("state", ["new", "idle", "stuck", "lost"])
def test_a_writer_stops_in_every_state(state: str) -> None:
    with Node() as node:
        if state == "new":
            writer, lines = node.writer(), None
        else:
            writer, lines = node.attached(receive_buffer=4096)
        channels = node.channels(writer)
        dropped = 0
        if state == "stuck":
            for index in range(30):
                channels.send(outgoing(index, b"x" * MIB))
        elif state == "lost":
            assert lines is not None
            lines.peer.close()
            writer.lost.get(timeout=LONG_TIMEOUT)
        began = time.monotonic()
        dropped = writer.begin_stop()
        assert channels.send(outgoing(99)) is not SendResult.STOPPED  # by post: that is up
        assert writer.wait_stopped(LONG_TIMEOUT)
        assert time.monotonic() - began < LONG_TIMEOUT / 2
        books = writer.stats()
        assert_balanced(books)
        assert (books.queued, books.in_flight) == (0, 0)
        assert books.dropped >= dropped
        late = Lines()
        assert not writer.attach(late.ours, HEAD, is_chunked=True)
        assert late.read_to_end() == b""
        if state == "idle":
            assert lines is not None
            assert lines.read_to_end().endswith(LAST_CHUNK)


def test_an_end_that_is_first_used_while_all_is_stopped_does_not_hold_up_the_stop() -> None:
    with Node() as node:
        late = node.reader()
        refused: list[Exception] = []

        class First(Writer):
            def begin_stop(self) -> int:
                try:
                    late.dial_after(0)
                except UsageError as error:
                    refused.append(error)
                return super().begin_stop()

            def on_event(self, event: object, error: int) -> None: ...

        first = First(
            node.streams, "msgapp", MEMBER, PEER, profile="3.5", queue_length=1, queue_bytes=MIB
        )
        node.ends.append(first)
        assert first.attach(Lines().ours, HEAD, is_chunked=True)
        ended = threading.Thread(
            target=node.dispatcher.stop, args=(time.monotonic() + LONG_TIMEOUT,), daemon=True
        )
        ended.start()
        ended.join(LONG_TIMEOUT / 3)
        assert not ended.is_alive()
        assert len(refused) == 1


def test_a_forked_child_has_no_stream() -> None:
    with Node() as node:
        writer, lines = node.attached()
        channels = node.channels(writer)
        reader, _ = node.up()
        child = os.fork()
        if child == 0:
            try:
                assert channels.send(outgoing(0)) is SendResult.STOPPED
                assert not writer.working
                assert channels.name_for(outgoing(0)) == "pipeline"
                assert not writer.attach(Lines().ours, HEAD, is_chunked=True)
                assert writer.begin_stop() == 0
                assert reader.wait_stopped(0)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        assert exit_status_of(child) == 0
        assert channels.send(outgoing(1)) is SendResult.ACCEPTED
        eventually(lambda: writer.stats().sent == 1)
        assert lines.peer.recv(100)
