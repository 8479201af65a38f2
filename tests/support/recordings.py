"""The recorded streams of ``tests/data/streams``."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STREAMS = Path(__file__).parents[1] / "data" / "streams"

#: Whose encoder each version has.
PROFILES = {"3.4": "3.5", "3.5": "3.5", "3.6": "3.6", "3.7": "3.7", "3.8": "3.7"}


@dataclass
class Recording:
    """One stream, as an etcd wrote it."""

    version: str
    what: str
    about: dict[str, Any]
    #: Behind the head, in chunks.
    chunked: bytes

    def __str__(self) -> str:
        return f"{self.version}-{self.what}"

    @property
    def stream(self) -> str:
        return str(self.about["kind"])

    @property
    def profile(self) -> str:
        return PROFILES[self.version[:3]]

    @property
    def members(self) -> dict[str, int]:
        """Who writes and who reads, as a reader and a writer of frames are told."""
        return {"from_": int(self.about["member"], 16), "to": int(self.about["dialler"], 16)}


def recordings() -> list[Recording]:
    """Return all of them."""
    found = []
    for archive in sorted(STREAMS.glob("*.tar.xz")):
        files = {}
        with tarfile.open(archive) as tar:
            for info in tar:
                reader = tar.extractfile(info)
                if reader is not None:
                    files[Path(info.name).name] = reader.read()
        for name in sorted(files):
            if name.endswith(".json"):
                what = name.removesuffix(".json")
                about = json.loads(files[name])
                body = files[f"{what}.bin"][about["head_bytes"] :]
                found.append(Recording(archive.name.removesuffix(".tar.xz"), what, about, body))
    return found
