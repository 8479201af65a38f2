"""Who we are: the IDs, addresses and versions that every request of ours names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.arguments import require_id
from pipeline.errors import UsageError
from pipeline.logs import show

__all__ = [
    "MIN_CLUSTER_VERSION",
    "Identity",
    "Version",
    "compare_major_minor",
    "require_versions",
]

#: The lowest cluster version we can take part in; etcd ``version.MinClusterVersion`` of every 3.x.
MIN_CLUSTER_VERSION = "3.0.0"


class Version(NamedTuple):
    """An etcd version. Only ``major`` and ``minor`` decide compatibility."""

    major: int
    minor: int
    #: As it was written, with patch, pre-release and build metadata.
    text: str

    @classmethod
    def parse(cls, text: str) -> Version:
        """Read a version, strict (``2.1.0-alpha.0+git``) or lenient (``3.5``, ``v3.5.0``).

        Raises ``UsageError`` for anything else. Source: etcd 3.4 takes only the strict form, the
        newest one both (semver ``NewVersion``).
        """
        match = _VERSION.fullmatch(text)
        if match is None:
            raise UsageError(f"version: {text[:64]!r} is not major.minor.patch[-pre][+meta]")
        return cls(int(match[1]), int(match[2] or 0), text)

    def __str__(self) -> str:
        return self.text


# At most 18 digits a part, so that no number is costly to convert.
_VERSION = re.compile(
    r"v?([0-9]{1,18})(?:\.([0-9]{1,18}))?(?:\.[0-9]{1,18})?"
    r"(?:-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?"
)
_STRICT_VERSION = re.compile(
    r"(?:0|[1-9][0-9]{0,8})(?:\.(?:0|[1-9][0-9]{0,8})){2}(?:-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?"
)


def require_versions(server: str, min_cluster: str) -> tuple[Version, Version]:
    """Return the versions we claim; ``UsageError`` for those that an etcd would not bear.

    In the strict form: etcd up to 3.7 panics at any other in a header.
    """
    versions = []
    for name, text in (("server_version", server), ("min_cluster_version", min_cluster)):
        if not isinstance(text, str) or not _STRICT_VERSION.fullmatch(text):
            raise UsageError(f"{name}: {show(text)} is not major.minor.patch[-pre][+meta]")
        versions.append(Version.parse(text))
    ours, lowest = versions
    if compare_major_minor(lowest, ours) > 0:
        raise UsageError(f"min_cluster_version: {show(min_cluster)} is above our own, {server}")
    return ours, lowest


def compare_major_minor(a: Version, b: Version) -> int:
    """Return -1, 0 or 1 as ``a`` is older than, equal to or newer than ``b``, patch ignored."""
    left, right = a[:2], b[:2]
    return (left > right) - (left < right)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who posts: a member of a cluster, where it is reached, and the etcd that it stands for.

    Raises
    ------
    UsageError
        If an ID does not fit 64 bits, or a version is one that an etcd would not bear.
    """

    #: 64 bits, as all IDs.
    member_id: int
    cluster_id: int
    #: Where peers reach us, as ``urls.parse_peer_urls`` gives them; may be empty.
    peer_urls: tuple[str, ...]
    #: Sent as they are written.
    server_version: str
    min_cluster_version: str = MIN_CLUSTER_VERSION

    def __post_init__(self) -> None:
        require_id("member_id", self.member_id)
        require_id("cluster_id", self.cluster_id)
        require_versions(self.server_version, self.min_cluster_version)
