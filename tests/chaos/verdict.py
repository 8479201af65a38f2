"""What must hold of the logs at the end, whatever has happened to the members."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline import Entry
from pipeline.examples.etcd import put_of

Put = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Log:
    """One of our members': what a database stands for, and the entries behind that."""

    base: int
    puts_of_database: set[Put]
    entries: Sequence[Entry]

    def puts(self) -> list[Put]:
        """The puts of the entries, in their order."""
        return [put for entry in self.entries if (put := put_of(entry)) is not None]


def violations(
    acknowledged: Mapping[bytes, bytes],
    items: Sequence[Put],
    logs: Mapping[str, Log],
) -> list[str]:
    """Say what does not hold; nothing if all is well.

    Parameters
    ----------
    acknowledged : mapping of bytes to bytes
        The writes that a client was told are committed. No key is written twice.
    items : sequence of (bytes, bytes)
        What etcd holds, in the order of the revisions that wrote it.
    logs : mapping of str to Log
        What each of our members holds, all of it committed.
    """
    found = _lost("etcd", acknowledged, dict(items))
    position = {put: n for n, put in enumerate(items)}
    for name, log in logs.items():
        puts = log.puts()
        found += _lost(name, acknowledged, dict([*log.puts_of_database, *puts]))
        twice = [key for key, count in Counter(key for key, _ in puts).items() if count > 1]
        if twice:
            found.append(f"{name} has {len(twice)} writes twice, such as {twice[0]!r}")
        unknown = [put for put in puts if put not in position]
        if unknown:
            found.append(f"{name} has {len(unknown)} writes that etcd has not: {unknown[0][0]!r}")
        order = [position[put] for put in puts if put in position]
        if any(b < a for a, b in itertools.pairwise(order)):
            found.append(f"{name} has writes in another order than etcd")
        behind = [put for put in items if put not in log.puts_of_database]
        if len(behind) > len(puts):
            missing = set(behind) - set(puts)
            found.append(f"etcd has {len(missing)} writes that {name} has not")
    found += _differing(logs)
    return found


def _lost(name: str, acknowledged: Mapping[bytes, bytes], held: Mapping[bytes, bytes]) -> list[str]:
    lost = [key for key, value in acknowledged.items() if held.get(key) != value]
    if not lost:
        return []
    return [f"{name} has lost {len(lost)} acknowledged writes, such as {lost[0]!r}"]


def _differing(logs: Mapping[str, Log]) -> list[str]:
    """Compare our logs, entry by entry, behind the snapshots of both."""
    found = []
    for (name, log), (other, their_log) in itertools.pairwise(logs.items()):
        ours = {entry.index: entry for entry in log.entries}
        theirs = {entry.index: entry for entry in their_log.entries}
        base = max(log.base, their_log.base)
        for index in sorted(index for index in ours.keys() | theirs.keys() if index > base):
            one, two = ours.get(index), theirs.get(index)
            if one is None or two is None:
                found.append(f"{name if one is None else other} has no entry {index}")
                break
            if (one.term, one.data or b"") != (two.term, two.data or b""):
                found.append(f"{name} and {other} differ in entry {index}")
                break
    return found
