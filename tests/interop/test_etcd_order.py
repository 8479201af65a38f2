"""Two real etcds and us, written to by many at once: what is appended reaches us in order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipeline import Inbox, MessageType, Transport
from pipeline.examples.etcd import config_beside, find_etcd, free_port, put_of
from tests.support import LONG_TIMEOUT
from tests.support.etcd import PatientEtcd, RecordingFollower, out_of_order
from tests.support.tls import Authority
from tests.support.waiting import eventually

pytestmark = [pytest.mark.etcd, pytest.mark.streams]

PUTS, CLIENTS = 3000, 16


@pytest.mark.slow
@pytest.mark.parametrize("has_inbox", [True, False], ids=["inbox", "process"])
@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "TLS"])
def test_no_append_of_three_thousand_puts_overtakes_another(
    tmp_path: Path, has_inbox: bool, has_tls: bool
) -> None:
    """Over the four connections of a pipeline a quarter of them and more does.

    Ordered is what one stream carries. What was posted before it came up may arrive after what it
    carries, and of one that is replaced the last frame may be lost: either is a step and its
    correction, two places of this test, so it begins when nothing is posted any more.
    """
    scheme = "https" if has_tls else "http"
    our_url, second_url = (f"{scheme}://127.0.0.1:{free_port()}" for _ in range(2))
    authority = Authority(tmp_path / "certs") if has_tls else None
    tls = {name: authority and authority.info(name) for name in ("first", "second", "ours")}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    binary = find_etcd()
    first = PatientEtcd(
        binary, tmp_path / "first", our_url, more_urls=[second_url], tls=tls["first"]
    )
    second = PatientEtcd(
        binary,
        tmp_path / "second",
        our_url,
        more_urls=[first.peer_url],
        tls=tls["second"],
        peer_url=second_url,
    )
    etcds = (first, second)
    follower = RecordingFollower(first.other_id, *(etcd.id for etcd in etcds), campaigns=False)
    inbox = Inbox() if has_inbox else None
    transport = Transport(
        follower.member_id,
        first.cluster_id,
        follower,
        peer_urls=[our_url],
        tls=tls["ours"],
        config=config_beside(first.version),
        inbox=inbox,
    )

    def since() -> list[float | None]:
        return [end.since for peer in transport.peer_stats().values() for end in peer.streams]

    with ExitStack() as stack:
        stack.enter_context(transport)
        for etcd in etcds:
            transport.add_peer(etcd.id, [etcd.peer_url])
        listener = transport.listen(our_url)
        stack.callback(follower.stop)
        follower.start(transport.send, inbox=inbox)
        for etcd in etcds:
            stack.callback(etcd.stop)
            etcd.start()
        for etcd in etcds:
            etcd.wait_ready()
        eventually(
            lambda: len(since()) == 8 and None not in since(), "both etcds and we have all streams"
        )

        def is_nothing_posted() -> bool:
            """An etcd has a stream a moment later than we do; until then it posts."""
            posted = listener.stats().fast_requests
            for _ in range(20):
                first.put(b"before", b"")
            return listener.stats().fast_requests == posted

        eventually(is_nothing_posted, "the leader appends by its stream alone")
        assert follower.wait_for(lambda s: s.commit == s.last_index, LONG_TIMEOUT)

        begun, posted, were_up = len(follower.messages), listener.stats().fast_requests, since()
        written = {b"key %d" % n: b"value %d" % n for n in range(PUTS)}
        with ThreadPoolExecutor(CLIENTS) as pool:
            for _ in pool.map(lambda put: first.put(*put), written.items()):
                pass

        def holds_all() -> bool:
            """What is committed is told with the leader's next message."""
            held = dict(put for entry in follower.committed() if (put := put_of(entry)))
            return written.items() <= held.items()

        eventually(holds_all, "all that was written is committed in our log")
        messages = follower.messages[begun:]
        assert listener.stats().fast_requests == posted
        assert since() == were_up

    appends = [m for m in messages if m.type == MessageType.APP]
    assert sum(len(m.entries) for m in appends) >= PUTS
    assert out_of_order(appends) == [], f"of {len(appends)}"
