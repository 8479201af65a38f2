"""``examples/change_feed.py`` beside two real etcds: what is written there is what it prints."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import urllib3

from pipeline.examples.etcd import find_etcd, free_port
from tests.support.etcd import PatientEtcd
from tests.support.processes import TIMEOUT_S, Program
from tests.support.tls import Authority
from tests.support.waiting import eventually

pytestmark = pytest.mark.etcd

Line = dict[str, Any]

#: etcd takes a snapshot of itself after as many entries.
SNAPSHOT_COUNT = 100


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


class Etcds:
    """Two etcds; neither commits without the other."""

    def __init__(self, directory: Path, authority: Authority | None) -> None:
        self.scheme = "http" if authority is None else "https"
        url = f"{self.scheme}://127.0.0.1:{free_port()}"
        # A member is added at once, without the 5 s for which all must have been there.
        flags = ("--snapshot-count", str(SNAPSHOT_COUNT), "--strict-reconfig-check=false")
        for name in ("one", "two"):
            (directory / name).mkdir()
        tls = {name: authority and authority.info(name) for name in ("one", "two", "feed")}
        self.one = PatientEtcd(find_etcd(), directory / "one", url, flags=flags, tls=tls["one"])
        self.two = PatientEtcd(
            find_etcd(),
            directory / "two",
            self.one.peer_url,
            flags=flags,
            tls=tls["two"],
            peer_url=url,
        )
        self.tls = tls["feed"]
        self.members = (self.one, self.two)

    def start(self) -> None:
        for member in self.members:
            member.start()
        for member in self.members:
            member.wait_ready()

    def stop(self) -> None:
        for member in self.members:
            member.stop()

    def restart(self) -> None:
        """Stop both and start both. They keep no log then but what is behind their snapshots."""
        for member in self.members:
            eventually(member.has_snapshot, "a snapshot")
            member.commit_database()
        self.stop()
        self.start()

    def move_leader(self) -> None:
        """Let the other lead."""
        leader = self.leader()
        (other,) = (member for member in self.members if member is not leader)
        leader.move_leader(other.id)

    def leader(self) -> PatientEtcd:
        """Return who leads."""
        found: list[PatientEtcd] = []

        def is_known() -> bool:
            status = self.one.call("/v3/maintenance/status", {})
            found[:] = [each for each in self.members if str(each.id) == status.get("leader")]
            return bool(found)

        eventually(is_known, "there is a leader")
        return found[0]

    def write(self, prefix: str, count: int) -> None:
        """Put many keys at a time."""
        with ThreadPoolExecutor(8) as pool:
            puts = [(f"{prefix} {n}".encode(), b"%d" % n) for n in range(count)]
            for _ in pool.map(lambda put: self.one.put(*put), puts):
                pass


class Feed(Program):
    """The program, at one URL whenever it runs."""

    def __init__(self, etcds: Etcds, url: str, *arguments: str) -> None:
        clients = [member.client_url for member in etcds.members]
        if (tls := etcds.tls) is not None:
            files = {"cert": tls.cert_file, "key": tls.key_file, "cacert": tls.trusted_ca_file}
            arguments += tuple(f"--{name}={path}" for name, path in files.items())
        super().__init__("pipeline.examples.change_feed", *arguments, "--listen", url, *clients)

    @property
    def told(self) -> list[Line]:
        return [json.loads(line) for line in self.lines if line.startswith("{")]

    @property
    def last(self) -> int:
        """The index of the last line that has one."""
        return max(line.get("index", 0) for line in self.told)

    def wait_key(self, key: str) -> None:
        self.wait_line(f'"key":"{key}"')


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def has_tls() -> bool:
    return False


@pytest.fixture
def etcds(stack: ExitStack, tmp_path: Path, has_tls: bool) -> Etcds:
    etcds = Etcds(tmp_path, Authority(tmp_path / "certs") if has_tls else None)
    stack.callback(lambda: print(*(member.log_tail(50) for member in etcds.members)))
    stack.callback(etcds.stop)
    etcds.start()
    return etcds


@pytest.fixture
def url(etcds: Etcds) -> str:
    return f"{etcds.scheme}://127.0.0.1:{free_port()}"


def replay(lines: list[Line]) -> dict[str, str]:
    """Do what the lines say to keys, of which there is one at a time in a deletion."""
    keys: dict[str, str] = {}
    for line in lines:
        match line["kind"]:
            case "snapshot":
                keys.clear()
            case "put" | "key":
                keys[line["key"]] = line["value"]
            case "delete_range":
                keys.pop(line["key"], None)
    return keys


def held(etcds: Etcds) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in etcds.one.items().items()}


@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "TLS"])
def test_what_is_done_to_an_etcd_is_printed_once_each_in_order(
    stack: ExitStack, etcds: Etcds, url: str
) -> None:
    one = etcds.one
    one.put(b"before", b"1")
    feed = stack.enter_context(Feed(etcds, url))
    feed.wait_key("before")  # it has been in the log since before the feed was there

    one.put(b"colour", b"red")
    one.put(b"\xff\0", b"")
    one.call("/v3/kv/deleterange", {"key": b64("colour")})
    one.call("/v3/kv/deleterange", {"key": b64("a"), "range_end": b64("b")})
    is_new = {"target": "MOD", "key": b64("new"), "result": "EQUAL", "mod_revision": "0"}
    put = {"request_put": {"key": b64("new"), "value": b64("1")}}
    get = {"request_range": {"key": b64("new")}}
    one.call("/v3/kv/txn", {"compare": [is_new], "success": [put], "failure": [get]})
    lease = one.call("/v3/lease/grant", {"TTL": "600"})["ID"]
    assert isinstance(lease, str)
    one.call("/v3/kv/put", {"key": b64("leased"), "value": b64("1"), "lease": lease})
    one.call("/v3/lease/revoke", {"ID": lease})
    one.call("/v3/kv/compaction", {"revision": "2"})
    etcds.move_leader()
    one.put(b"after", b"2")
    feed.wait_key("after")

    told = feed.told
    assert [line["index"] for line in told] == [*range(1, feed.last + 1)]
    terms = [line["term"] for line in told]
    assert terms == sorted(terms)
    assert len(set(terms)) >= 2
    id_ = f"{int(lease):x}"
    changes = [
        {name: value for name, value in line.items() if name not in ("index", "term")}
        for line in told
        if line["kind"] in ("put", "delete_range", "txn", "compaction")
        or line["kind"].startswith("lease_")
    ]
    assert changes == [
        {"kind": "put", "key": "before", "value": "1"},
        {"kind": "put", "key": "colour", "value": "red"},
        {"kind": "put", "key": {"base64": "/wA="}, "value": ""},
        {"kind": "delete_range", "key": "colour"},
        {"kind": "delete_range", "key": "a", "range_end": "b"},
        {
            "kind": "txn",
            "compare": [{"result": "EQUAL", "target": "MOD", "key": "new", "mod_revision": 0}],
            "success": [{"put": {"key": "new", "value": "1"}}],
            "failure": [{"range": {"key": "new"}}],
        },
        {"kind": "lease_grant", "TTL": 600, "ID": id_},
        {"kind": "put", "key": "leased", "value": "1", "lease": id_},
        {"kind": "lease_revoke", "ID": id_},
        {"kind": "compaction", "revision": 2},
        {"kind": "put", "key": "after", "value": "2"},
    ]
    members = [line for line in told if line["kind"].startswith("ConfChange")]
    assert [line["peer_urls"] for line in members[-1:]] == [[url]]
    assert members[-1]["kind"] == "ConfChangeAddLearnerNode"
    assert feed.terminate() == 0
    # That an answer was on its way when it ended is a warning.
    log = "\n".join(line for line in feed.lines if not line.startswith("{"))
    assert "ERROR" not in log
    assert "Traceback" not in log


def test_a_feed_that_is_killed_goes_on_where_it_was_and_nothing_is_missing(
    stack: ExitStack, etcds: Etcds, url: str
) -> None:
    feed = stack.enter_context(Feed(etcds, url))
    lines: list[Line] = []
    for life in range(3):
        etcds.write(f"life {life}", 40)
        feed.wait_line(f'"key":"life {life}')
        feed.process.kill()  # perhaps in the middle of the rest
        feed.process.wait(TIMEOUT_S)
        etcds.write(f"after life {life}", 20)
        etcds.move_leader()
        whole = [json.loads(line) for line in feed.lines if line.endswith("}")]
        lines += [line for line in whole if line["index"] > (lines[-1]["index"] if lines else 0)]
        feed = stack.enter_context(Feed(etcds, url, "--after", str(lines[-1]["index"])))
    etcds.one.put(b"last", b"1")
    feed.wait_key("last")
    lines += feed.told
    assert [line["index"] for line in lines] == [*range(1, lines[-1]["index"] + 1)]
    assert replay(lines) == held(etcds)


def test_a_reader_that_is_slow_holds_up_nobody_and_misses_nothing(etcds: Etcds, url: str) -> None:
    clients = [member.client_url for member in etcds.members]
    module = "pipeline.examples.change_feed"
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", module, "--listen", url, *clients],
        stdout=subprocess.PIPE,
    ) as feed:
        assert feed.stdout is not None
        try:
            first = json.loads(feed.stdout.readline())
            value = bytes(1000)  # all together they are much more than a pipe holds
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda n: etcds.one.put(b"%d" % n, value), range(2000)))
            indexes, keys = [first["index"]], set()
            while len(keys) < 2000:
                line = json.loads(feed.stdout.readline())
                indexes.append(line["index"])
                keys |= {line["key"]} if line["kind"] == "put" else set()
        finally:
            feed.terminate()
    assert indexes == [*range(1, len(indexes) + 1)]


def test_a_feed_that_is_left_behind_is_given_all_keys(
    stack: ExitStack, etcds: Etcds, url: str
) -> None:
    feed = stack.enter_context(Feed(etcds, url))
    for key in (b"kept", b"changed", b"deleted"):
        etcds.one.put(key, b"before")
    feed.wait_key("deleted")
    assert feed.terminate() == 0
    after = feed.last

    etcds.one.put(b"changed", b"meanwhile")
    etcds.one.call("/v3/kv/deleterange", {"key": b64("deleted")})
    etcds.write("meanwhile", 2 * SNAPSHOT_COUNT)
    etcds.restart()
    feed = stack.enter_context(Feed(etcds, url, "--after", str(after)))
    feed.wait_line('"kind":"snapshot_end"')
    etcds.one.put(b"last", b"1")
    feed.wait_key("last")

    kinds = [line["kind"] for line in feed.told]
    assert feed.told[0] == {"kind": "snapshot", "after": after}
    end = feed.told[kinds.index("snapshot_end")]
    assert end["index"] > after + SNAPSHOT_COUNT
    indexes = [line["index"] for line in feed.told if "index" in line]
    assert indexes == [*range(end["index"], feed.last + 1)]
    assert replay(feed.told) == held(etcds)
    assert feed.terminate() == 0


def test_who_does_not_say_where_to_go_on_is_asked(stack: ExitStack, etcds: Etcds, url: str) -> None:
    feed = stack.enter_context(Feed(etcds, url))
    etcds.one.put(b"key", b"1")
    feed.wait_key("key")
    assert feed.terminate() == 0
    for arguments, told in (
        ((), "is a member: --after"),
        (("--after", "1000000"), "the log ends at"),
    ):
        again = stack.enter_context(Feed(etcds, url, *arguments))
        assert again.process.wait(TIMEOUT_S) == 1
        again.wait_line(told)
        assert again.told == []


def test_a_member_that_is_new_is_sent_what_the_one_before_it_had_and_lost(
    stack: ExitStack, etcds: Etcds, url: str
) -> None:
    feed = stack.enter_context(Feed(etcds, url))
    feed.wait_line(f'"peer_urls":\\["{url}"\\]')
    etcds.one.put(b"read", b"1")
    etcds.one.put(b"lost", b"1")
    feed.wait_key("lost")
    (member,) = (line for line in feed.told if line.get("peer_urls") == [url])
    after = next(line["index"] for line in feed.told if line.get("key") == "read")
    assert feed.terminate() == 0
    etcds.one.call("/v3/cluster/member/remove", {"ID": str(int(member["member"], 16))})
    etcds.one.put(b"meanwhile", b"1")
    # At another URL: of the same one within a second etcd makes the ID that is removed.
    url = f"{etcds.scheme}://127.0.0.1:{free_port()}"
    feed = stack.enter_context(Feed(etcds, url, "--after", str(after)))
    feed.wait_key("meanwhile")
    assert feed.told[0]["index"] == after + 1
    assert [line["key"] for line in feed.told if line["kind"] == "put"] == ["lost", "meanwhile"]


def test_a_feed_whose_member_is_removed_says_so_and_ends(
    stack: ExitStack, etcds: Etcds, url: str
) -> None:
    """The entry that says so may come too late, or not at all: a stream's dial is answered 410."""
    feed = stack.enter_context(Feed(etcds, url))
    member = feed.wait_line(f'"member":"(\\w+)","peer_urls":\\["{url}"\\]')[1]
    etcds.one.call("/v3/cluster/member/remove", {"ID": str(int(member, 16))})
    feed.wait_line("^this member was removed from the cluster$")
    assert feed.process.wait(TIMEOUT_S) == 1


def test_where_authentication_is_on_the_lines_say_who_has_asked(
    stack: ExitStack, etcds: Etcds, url: str
) -> None:
    root = {"name": "root", "password": "secret"}
    etcds.one.call("/v3/auth/user/add", {**root})
    etcds.one.call("/v3/auth/role/add", {"name": "root"})
    etcds.one.call("/v3/auth/user/grant", {"user": "root", "role": "root"})
    etcds.one.call("/v3/auth/enable", {})
    feed = stack.enter_context(Feed(etcds, url, "--user", "root:secret"))
    token = etcds.one.call("/v3/auth/authenticate", {**root})["token"]
    put = {"key": b64("key"), "value": b64("1")}
    address = f"{etcds.one.client_url}/v3/kv/put"
    headers = {"Authorization": str(token)}
    assert urllib3.request("POST", address, json=put, headers=headers).status == 200
    feed.wait_key("key")
    (line,) = (line for line in feed.told if line["kind"] == "put")
    assert line["user"] == "root"
    assert "secret" not in "".join(feed.lines)
