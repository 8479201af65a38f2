"""Two nodes in one process exchange messages: the program of the README."""

from pipeline import Inbox, Message, MessageType, SnapshotStatus, Transport


class Reports:
    """What a node is told (``pipeline.RaftReports``); called from the library's threads."""

    def is_id_removed(self, member_id: int) -> bool:
        return False

    def report_unreachable(self, member_id: int) -> None: ...
    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None: ...


a, b = Inbox(), Inbox()
with Transport(1, 0x77, Reports(), inbox=a) as one, Transport(2, 0x77, Reports(), inbox=b) as two:
    one.add_peer(2, [two.listen("http://127.0.0.1:0").url])
    two.add_peer(1, [one.listen("http://127.0.0.1:0").url])
    one.send([Message(type=MessageType.HEARTBEAT, to=2, from_=1, term=1)])
    print("2 got", *b.take(timeout=10))
    two.send([Message(type=MessageType.HEARTBEAT_RESP, to=1, from_=2, term=1)])
    print("1 got", *a.take(timeout=10))
