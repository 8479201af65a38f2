"""A node: what implements ``Raft``, and what does not."""

from pathlib import Path

from pipeline import (
    EncodedMessage,
    Inbox,
    Message,
    Pipeline,
    Raft,
    RequestRejected,
    SnapshotStatus,
    TLSInfo,
    Transport,
)


class Node:
    def process(self, message: Message) -> None:
        if message.term < 2:
            raise RequestRejected(503, b"later\n", content_type="text/plain")

    def is_id_removed(self, member_id: int) -> bool:
        return member_id == 7

    def report_unreachable(self, member_id: int) -> None:
        pass

    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None:
        assert status is SnapshotStatus.FINISH or status is SnapshotStatus.FAILURE


class Deaf:
    def is_id_removed(self, member_id: int) -> bool:
        return False

    def report_unreachable(self, member_id: int) -> None:
        pass

    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None:
        pass


class TakesBytes(Deaf):
    def process(self, message: bytes) -> None:
        pass


class TakesEncoded(Deaf):
    def process(self, message: EncodedMessage) -> None:
        assert len(message) or message.term == 0


class TakesBoth(Deaf):
    def process(self, message: Message | EncodedMessage) -> None:
        pass


class AsyncNode(Deaf):
    async def process(self, message: Message) -> None:
        pass


raft: Raft = Node()
raw: Raft[EncodedMessage] = TakesEncoded()
either: Raft[Message | EncodedMessage] = TakesBoth()
raft = TakesBoth()
raft = TakesEncoded()  # type: ignore[assignment]
Transport(1, 0x77, Node())
Transport(1, 0x77, TakesEncoded())
Transport(1, 0x77, TakesBoth())
Transport(1, 0x77, Deaf())  # type: ignore[call-overload]
Transport(1, 0x77, TakesBytes())  # type: ignore[arg-type]
Transport(1, 0x77, AsyncNode())  # type: ignore[call-overload]
Transport(1, 0x77, Deaf(), inbox=Inbox())
Transport(1, 0x77, Deaf(), inbox=None)  # type: ignore[call-overload]
Pipeline(2, ["http://127.0.0.1:2380"], Node(), member_id=1, cluster_id=0x77)
Pipeline(2, ["http://127.0.0.1:2380"], Deaf(), member_id=1, cluster_id=0x77)  # type: ignore[arg-type]
Transport(1, 0x77, Node(), remote_policy=lambda member_id, urls, caller: len(urls) == 1)
Transport(1, 0x77, Node(), remote_policy=lambda member_id: True)  # type: ignore[arg-type, misc]

files = TLSInfo(
    cert_file="cert",
    key_file=Path("key"),
    trusted_ca_file="ca",
    allow_member=lambda certificate, member_id: member_id == len(certificate["subject"]),
)
Transport(1, 0x77, Node(), tls=files)
Transport(1, 0x77, Node(), tls="files")  # type: ignore[call-overload]
TLSInfo(cert_file="cert", key_file="key", allowed_cn="etcd")  # type: ignore[arg-type]
