"""Every change of an etcd, as a line of JSON, when it is committed: a learner with no log.

::

    python -m pipeline.examples.change_feed --listen http://127.0.0.1:2390 http://127.0.0.1:2379

The program has an etcd, here the one at the second URL, add it to the cluster as a learner that is
reached at the first. From then on it asks no API for anything: the leader sends it the log, as it
does to all members. Each entry becomes a line, a snapshot becomes the lines of all keys, and with
``--after INDEX``, of the last line, the program goes on where it was ended. What the lines are,
what comes twice and what is lost: docs/howto/change-feed.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import urllib3

from pipeline import (
    Entry,
    EntryType,
    Inbox,
    MemberRemovedError,
    Message,
    MessageType,
    ReceiverConfig,
    SnapshotStatus,
    TLSInfo,
    Transport,
    TransportConfig,
    UsageError,
)
from pipeline.examples.etcd import config_beside
from pipeline.examples.etcd_log import Line, keys_of, line_of, members_of
from pipeline.raftpb.raft_pb2 import ConfChange, ConfChangeType

__all__ = ["FeedError", "Learner", "main"]


class FeedError(Exception):
    """The feed cannot begin, or not go on."""


class Learner:
    """A member whose log is what it has printed.

    It acknowledges an entry when its line is written, not when it has come: a leader never sends
    again what was acknowledged. So whatever becomes of this process, the reader has the lines of
    all that is not sent again.

    Parameters
    ----------
    member_id, cluster_id : int
    index : int
        Of the last line.
    **arguments
        Those of its Transport; the config has a ``snapshot_dir``.
    """

    def __init__(self, member_id: int, cluster_id: int, index: int, **arguments: Any) -> None:
        self.id = member_id
        self.index = index
        self.term = 0
        self.is_removed = False
        # The entries behind the last line. Until they are committed others may take their place.
        self.pending: list[Entry] = []
        self.inbox = Inbox()
        self.transport = Transport(
            *(member_id, cluster_id, self),
            inbox=self.inbox,
            on_critical_error=self.end,
            **arguments,
        )

    # What the library tells (pipeline.RaftReports). The leader sends again what was lost, unasked.

    def report_unreachable(self, member_id: int) -> None: ...
    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None: ...
    def is_id_removed(self, member_id: int) -> bool:
        return False

    def end(self, error: MemberRemovedError) -> None:
        """Hear of a member that we are none any more."""
        self.is_removed = True

    def run(self, peers: dict[int, list[str]]) -> None:
        """Print what comes, for ever. FeedError when that cannot go on."""
        with self.transport:
            for member_id, urls in peers.items():
                self.transport.add_peer(member_id, urls)
            self.transport.listen()
            while not self.is_removed:
                answers = {}  # of several of a kind the last one says all
                for message in self.inbox.take(timeout=1.0):
                    if answer := self.step(message):
                        answers[answer.to, answer.type, answer.reject] = answer
                sys.stdout.flush()
                self.transport.send(answers.values())
        raise FeedError("this member was removed from the cluster")

    def step(self, message: Message) -> Message | None:
        """Print what is committed by a message; return what its sender is answered."""
        if message.type not in (MessageType.APP, MessageType.HEARTBEAT, MessageType.SNAP):
            return None  # not of a leader
        if message.term < self.term:  # of one that has to learn that there is another
            return self.answer(message, MessageType.APP_RESP)
        self.term = message.term
        if message.type == MessageType.HEARTBEAT:
            if message.commit > self.index:
                raise FeedError(
                    f"this member has acknowledged all up to {message.commit} before, which is not "
                    f"sent again: it cannot go on after {self.index}"
                )
            return self.answer(message, MessageType.HEARTBEAT_RESP, context=message.context)
        if message.type == MessageType.SNAP:
            self.restore(message)
        elif not self.append(message):
            rejected = {"index": message.index, "reject": True, "reject_hint": self.index}
            return self.answer(message, MessageType.APP_RESP, **rejected)
        return self.answer(message, MessageType.APP_RESP, index=self.index)

    def answer(self, message: Message, kind: MessageType, **fields: Any) -> Message:
        return Message(type=kind, to=message.from_, from_=self.id, term=self.term, **fields)

    def append(self, message: Message) -> bool:
        """Take entries, and print those that are committed; False if some before them are missing.

        All leaders have the same up to what is committed, so that only terms behind it are
        compared. Source: raft.go ``handleAppendEntries``.
        """
        pending = self.pending
        first = message.index - self.index  # the place of the first entry
        if first > len(pending) or (first > 0 and pending[first - 1].term != message.log_term):
            return False
        for at, entry in enumerate(message.entries, first):
            if at >= 0 and (at == len(pending) or pending[at].term != entry.term):
                pending[at:] = [entry]
        commit = min(message.commit, message.index + len(message.entries))
        committed = pending[: max(0, commit - self.index)]
        for entry in committed:
            self.index += 1
            tell({"index": self.index, "term": entry.term, **self.apply(entry)})
        del pending[: len(committed)]
        return True

    def apply(self, entry: Entry) -> Line:
        """Say what an entry does; what it does to the membership is done here, too."""
        data = bytes(entry.data or b"")
        if entry.type == EntryType.NORMAL:
            return line_of(data)
        if entry.type != EntryType.CONF_CHANGE:
            return {"kind": "unknown"}  # etcd makes no others
        change = ConfChange.FromString(data)
        peer_id, kind = change.node_id, ConfChangeType.Name(change.type)
        urls = json.loads(change.context or b"{}").get("peerURLs") or []
        if kind == "ConfChangeRemoveNode":
            self.forget(peer_id)
        elif urls:
            self.follow(peer_id, urls)
        return {"kind": kind, "member": f"{peer_id:x}", "peer_urls": urls}

    def follow(self, peer_id: int, urls: list[str]) -> None:
        """Know where a member is: it may be the next leader."""
        if peer_id != self.id:
            self.transport.add_peer(peer_id, urls)
            self.transport.update_peer(peer_id, urls)

    def forget(self, peer_id: int) -> None:
        if peer_id == self.id:
            self.is_removed = True
        else:
            self.transport.remove_peer(peer_id)

    def restore(self, message: Message) -> None:
        """Print all keys, of a snapshot. The line with its index comes last, when all are there."""
        assert message.snapshot is not None
        metadata = message.snapshot.metadata
        database = self.transport.snapshot_path(metadata.index)
        if database is None:
            return
        if metadata.index > self.index:
            tell({"kind": "snapshot", "after": self.index})
            for line in keys_of(database):
                tell(line)
            tell({"index": metadata.index, "term": metadata.term, "kind": "snapshot_end"})
            self.index = metadata.index
            self.pending.clear()
            members = members_of(database)
            for gone in self.transport.stats().keys() - members.keys():
                self.forget(gone)
            for peer_id, urls in members.items():
                self.follow(peer_id, urls)
        database.unlink()


def tell(line: Line) -> None:
    sys.stdout.write(json.dumps(line, separators=(",", ":")) + "\n")


class Api:
    """etcd's API in JSON, of the first member that answers."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.urls = asked.etcd
        self.http = urllib3.PoolManager(
            cert_file=asked.cert, key_file=asked.key, ca_certs=asked.cacert, retries=False
        )
        self.headers: dict[str, str] = {}
        if asked.user is not None:
            name, _, password = asked.user.partition(":")
            told = self.ask("/v3/auth/authenticate", {"name": name, "password": password})
            self.headers["Authorization"] = told["token"]

    def ask(self, path: str, body: Line) -> Line:
        """Return the answer; FeedError if there is none."""
        told = []
        for url in self.urls:
            try:
                answer = self.http.request(
                    "POST", url + path, json=body, headers=self.headers, timeout=10.0
                )
            except urllib3.exceptions.HTTPError as error:
                told.append(f"{url}: {error}")
                continue
            if answer.status == 200:
                return dict(answer.json())
            told.append(f"{url}{path}: {answer.status} {answer.data.decode(errors='replace')}")
        raise FeedError("\n".join(told))


def join(api: Api, listen: str, after: int | None) -> tuple[Line, Line, list[Line]]:
    """Become a learner, or be the one we were: how the cluster stands, we, and the others."""
    status = api.ask("/v3/maintenance/status", {})
    members = api.ask("/v3/cluster/member/list", {})["members"]
    ours = [member for member in members if listen in member.get("peerURLs", ())]
    others = [member for member in members if member not in ours]
    if ours and after is None:
        raise FeedError(f"{listen} is a member: --after which line? 0, if there was none")
    if (after or 0) > int(status["raftIndex"]):
        raise FeedError(f"--after {after}: the log ends at {status['raftIndex']}")
    if not ours:
        wanted = {"peerURLs": [listen], "isLearner": True}
        ours = [api.ask("/v3/cluster/member/add", wanted)["member"]]
    if not ours[0].get("isLearner"):
        raise FeedError(f"{listen} is a voter, and this program does not vote")
    return status, ours[0], others


def main(arguments: Sequence[str] | None = None) -> int:
    """Print changes until a signal ends it; 1 if it cannot."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.examples.change_feed")
    parser.add_argument("etcd", nargs="+", metavar="URL", help="client URLs of members")
    parser.add_argument("--listen", required=True, metavar="URL", help="our peer URL")
    parser.add_argument("--after", type=int, metavar="INDEX", help="of the last line that was read")
    parser.add_argument("--cert", metavar="PATH", help="our certificate, for peers and the API")
    parser.add_argument("--key", metavar="PATH", help="its key")
    parser.add_argument("--cacert", metavar="PATH", help="who signs certificates of members")
    parser.add_argument(
        "--user",
        default=os.environ.get("ETCDCTL_USER"),
        metavar="NAME:PASSWORD",
        help="for the API; by default what ETCDCTL_USER says",
    )
    asked = parser.parse_args(arguments)
    logging.basicConfig()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit())
    try:
        status, ours, others = join(Api(asked), asked.listen, asked.after)
        tls = None
        if asked.cert is not None:
            tls = TLSInfo(cert_file=asked.cert, key_file=asked.key, trusted_ca_file=asked.cacert)
        with tempfile.TemporaryDirectory(prefix="change-feed-") as directory:
            config = TransportConfig(receiver=ReceiverConfig(snapshot_dir=directory))
            Learner(
                int(ours["ID"]),
                int(status["header"]["cluster_id"]),
                asked.after or 0,
                peer_urls=[asked.listen],
                tls=tls,
                config=config_beside(status["version"], config),
            ).run({int(member["ID"]): member["peerURLs"] for member in others})
    except (FeedError, UsageError, OSError) as error:
        print(error, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
