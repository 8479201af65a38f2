"""Hooks of others that run between ours and the fork, as a signal's handler may: they use us.

Python runs the hooks before a fork in reverse order, and those after it in order, so what was
registered before the package was imported is next to the fork. Prints "ok" or what went wrong.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import warnings
from typing import Any

faulthandler.dump_traceback_later(120, exit=True)
warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork in a process with threads
transports: list[Any] = []


def listen_and_close() -> None:
    for transport in transports:
        transport.listen("http://127.0.0.1:0").close()


os.register_at_fork(before=listen_and_close, after_in_parent=listen_and_close)

from pipeline import Transport  # noqa: E402
from tests.support.raft import FakeRaft  # noqa: E402

transport = Transport(1, 1, FakeRaft())
transport.start()
transports.append(transport)
child = os.fork()
if child == 0:
    os._exit(0)
if os.waitpid(child, 0)[1] != 0:
    sys.exit("the child failed")
transport.stop()
print("ok", flush=True)
