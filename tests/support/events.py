"""What h11 is asked for."""

from __future__ import annotations

from typing import Any

import h11
import pytest


class Events:
    """Counts what h11 is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        next_event = h11.Connection.next_event

        def counting(connection: h11.Connection) -> Any:
            self.count += 1
            return next_event(connection)

        monkeypatch.setattr(h11.Connection, "next_event", counting)
