"""The members of a run, each a process, and the links between them."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.examples.etcd import EtcdMember, free_port, puts_in
from pipeline.examples.storage import Storage
from tests.chaos.link import Fault, Link, Network, faults
from tests.chaos.member import Setting
from tests.chaos.verdict import Log
from tests.support.tls import Authority
from tests.support.waiting import eventually

#: For something that must happen once nothing is wrong any more: an election takes 6 s at most, and
#: etcd starts in 1 s, on an idle machine.
TIMEOUT_S = 60.0
#: Small, so that etcd has to send its database to members that were away.
SNAPSHOT_COUNT = 2000


class ChaosError(Exception):
    """The cluster did not recover, or a member ended by itself."""


wait_until = functools.partial(eventually, timeout=TIMEOUT_S, error=ChaosError)


class OurMember:
    """A member of ours, for all its lives."""

    def __init__(self, name: str, setting: Setting, directory: Path) -> None:
        self.name = name
        self.setting = setting
        self.log_path = directory / "member.log"
        self.report_path = directory / "reports"
        self.lives = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, with the log it has on disk."""
        root = Path(__file__).resolve().parents[2]
        command = [sys.executable, "-m", "tests.chaos.member", json.dumps(asdict(self.setting))]
        self.lives += 1
        with self.log_path.open("ab") as log, self.report_path.open("ab") as reports:
            self._process = subprocess.Popen(
                command,
                cwd=root,
                stdin=subprocess.DEVNULL,
                stdout=reports,
                stderr=log,
                start_new_session=True,
            )

    def send_signal(self, number: signal.Signals) -> None:
        """Send the process a signal; nothing if it does not run."""
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End the process without a word."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def stop(self) -> None:
        """End it in good order, which it has to do; nothing if it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            code = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise ChaosError(f"{self.name} does not stop") from None
        if code != 0:
            raise ChaosError(f"{self.name} ended with {code}")

    def descriptors(self) -> list[str]:
        """Return the numbers of the descriptors that it has open."""
        assert self._process is not None
        return os.listdir(f"/proc/{self._process.pid}/fd")

    def check(self) -> None:
        """Raise ChaosError if it has ended by itself."""
        if self._process is not None and self._process.poll() is not None:
            raise ChaosError(f"{self.name} ended with {self._process.returncode}")

    def reports(self, last_bytes: int | None = None) -> list[dict[str, Any]]:
        """What it has said of itself, in all its lives or at the end; a line that a kill cut short
        is left out."""
        with self.report_path.open("rb") as file:
            if last_bytes is not None:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - last_bytes))
            lines = file.read().splitlines()
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def state(self) -> dict[str, Any]:
        """Where it stood a moment ago."""
        return self.reports(4096)[-1]

    def log(self, last: int) -> Log:
        """What it holds up to an index, once it is stopped."""
        with Storage(self.setting.storage) as storage:
            base = storage.base
            entries = [entry for entry in storage.entries if entry.index <= last]
        database = self.setting.snapshots / f"{base:016x}.snap.db"
        return Log(base, puts_in(database) if base else set(), entries)


class Cluster:
    """A real etcd, and one or two members of ours; each way between two of them is a link.

    Parameters
    ----------
    binary : Path
    directory : Path
        Existing; gets the data and logs of all.
    network : Network
    ours : int
        How many members of ours.
    has_tls : bool
        Whether they speak mutual TLS.
    """

    def __init__(
        self, binary: Path, directory: Path, network: Network, *, ours: int, has_tls: bool
    ) -> None:
        self.network = network
        scheme = "https" if has_tls else "http"
        authority = Authority(directory / "certs") if has_tls else None
        listening = [free_port() for _ in range(ours)]
        names = [f"ours{n}" for n in range(1, ours + 1)]
        to_ours = [
            network.link(f"etcd to {name}", port)
            for name, port in zip(names, listening, strict=True)
        ]
        urls = [f"{scheme}://127.0.0.1:{link.port}" for link in to_ours]
        self.etcd = EtcdMember(
            binary,
            directory,
            urls[0],
            flags=("--snapshot-count", str(SNAPSHOT_COUNT)),
            tls=authority.info("etcd") if authority else None,
            more_urls=urls[1:],
        )
        ids = [self.etcd.other_id, *self.etcd.more_ids]
        ports = {self.etcd.id: int(self.etcd.peer_url.rpartition(":")[2])}
        ports |= dict(zip(ids, listening, strict=True))
        names_by_id = {self.etcd.id: "etcd", **dict(zip(ids, names, strict=True))}
        self.ours: list[OurMember] = []
        for name, member_id, url, port in zip(names, ids, urls, listening, strict=True):
            home = directory / name
            home.mkdir()
            peers = {
                str(peer_id): f"{scheme}://127.0.0.1:"
                f"{network.link(f'{name} to {names_by_id[peer_id]}', target).port}"
                for peer_id, target in ports.items()
                if peer_id != member_id
            }
            files = None
            if authority is not None:
                cert, key = authority.issue(name)
                files = (os.fspath(cert), os.fspath(key), os.fspath(authority.ca_file))
            setting = Setting(
                member_id=member_id,
                cluster_id=self.etcd.cluster_id,
                url=url,
                listen_url=f"{scheme}://127.0.0.1:{port}",
                peers=peers,
                directory=os.fspath(home),
                etcd_version=self.etcd.version,
                tls=files,
            )
            self.ours.append(OurMember(name, setting, home))
        self.names = ["etcd", *names]

    @property
    def etcd_may_be_killed(self) -> bool:
        """etcd 3.5.0 to 3.5.2 may themselves lose a write when they are (etcd issue 13766)."""
        return re.match(r"3\.5\.[012](\D|$)", self.etcd.version) is None

    def links_of(self, name: str) -> list[Link]:
        """Return the links to and from a member."""
        return [link for link in self.network.links if name in link.name.split(" to ")]

    def start(self) -> None:
        """Start all, and wait until they commit."""
        for member in self.ours:
            member.start()
        self.etcd.start()
        self.etcd.wait_ready(TIMEOUT_S)
        wait_until(lambda: all(member.reports() for member in self.ours), "all of ours report")

    def stop(self) -> None:
        """End all processes, in whatever state they are."""
        self.etcd.stop()
        for member in self.ours:
            member.kill()

    def check(self) -> None:
        """Raise ChaosError if a member has ended by itself."""
        for member in self.ours:
            member.check()
        if not self.etcd.is_running():
            raise ChaosError(f"etcd ended by itself\n{self.etcd.log_tail()}")

    # Faults. Each holds for as long as the block runs.

    @contextlib.contextmanager
    def killed(self, name: str) -> Iterator[None]:
        """A member is killed, and then started on what it has on disk."""
        if name == "etcd":
            self.etcd.stop(graceful=not self.etcd_may_be_killed)
            yield
            self.etcd.start()
        else:
            member = self._our(name)
            member.kill()
            yield
            member.start()

    @contextlib.contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """A member is stopped by SIGSTOP, and goes on without knowing."""
        member = self.etcd if name == "etcd" else self._our(name)
        member.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            member.send_signal(signal.SIGCONT)

    def cut_off(self, name: str, fault: Fault) -> contextlib.AbstractContextManager[None]:
        """All links to and from a member have a fault."""
        return faults(self.network, self.links_of(name), fault)

    def cut_one(self, link: Link, fault: Fault) -> contextlib.AbstractContextManager[None]:
        """One link has a fault."""
        return faults(self.network, [link], fault)

    def _our(self, name: str) -> OurMember:
        (member,) = (member for member in self.ours if member.name == name)
        return member

    # The end

    def settle(self) -> int:
        """Wait until all members have the same log, all of it committed; its last index.

        A majority has what was acknowledged, so one of ours does: the two have it when they are
        equal. What they said before this does not count.
        """
        self.etcd.wait_ready(TIMEOUT_S)
        begin = time.monotonic()
        ends: set[int] = set()

        def is_settled() -> bool:
            states = [member.state() for member in self.ours]
            ends.clear()
            ends.update(index for s in states for index in (s["commit"], s["last_index"]))
            return len(ends) == 1 and all(state["at"] > begin for state in states)

        wait_until(is_settled, "all logs are equal and committed")
        return ends.pop()

    def unbalanced(self) -> int:
        """How many times a member of ours said that its books do not balance."""
        return sum(not report["balances"] for member in self.ours for report in member.reports())
