"""What holds for plain connections holds for TLS: the same tests, with servers that speak it."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import pytest

from pipeline.send.pipeline import PeerPipeline
from pipeline.tls.credentials import Credentials
from tests.fault.test_answers import *  # noqa: F403
from tests.fault.test_large import *  # noqa: F403
from tests.fault.test_stale_connections import *  # noqa: F403
from tests.fault.test_stop import *  # noqa: F403
from tests.functional.test_pipeline import *  # noqa: F403
from tests.support.server import ScriptedServer
from tests.support.tls import Authority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(autouse=True)
def over_tls(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make servers speak TLS, and pipelines able to; URLs that a test writes itself stay plain."""
    made: dict[str, Any] = {"tls": authority.server("server", "127.0.0.1", "localhost")}
    monkeypatch.setattr(ScriptedServer, "__init__", partialmethod(ScriptedServer.__init__, **made))
    made = {"credentials": Credentials(authority.info())}
    init = PeerPipeline.__init__
    monkeypatch.setattr(
        PeerPipeline,
        "__init__",
        lambda self, *args, **kwargs: init(self, *args, **{**kwargs, **made}),
    )
