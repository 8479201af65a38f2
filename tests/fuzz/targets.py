"""The targets: each takes bytes, and raises when something is wrong.

``python -m tests.fuzz.targets NAME [argument of libFuzzer]...`` is how ``fuzz.py`` runs one, with
libFuzzer and the sanitizers preloaded.
"""

from __future__ import annotations

import ctypes
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz import oracles, receiver, tls

HERE = Path(__file__).parent

#: Bytes of an input at most: a longer one finds nothing that these do not, and is slower.
MAX_LENGTHS = {
    "message": 1024,
    "answer": 512,
    "request": 1024,
    "receiver": 512,
    "inbox": 512,
    "tls": 512,
    "stream_message": 512,
    "stream_msgapp": 512,
}
NAMES = tuple(MAX_LENGTHS)


def check_request(data: bytes) -> None:
    if data and oracles.check_request(data):
        assert oracles.is_let_through(data)


def check_frames(stream: str, data: bytes) -> None:
    """The first byte says in which pieces the others come."""
    if data:
        oracles.check_frames(stream, data[1:], 1 + data[0] % 64)


def load(name: str, machine_type: Any = None) -> Callable[[bytes], object]:
    """Return the target of this name; those of a receiver need a machine (``build.py``)."""
    return {
        "message": oracles.check_message,
        "answer": oracles.check_answer,
        "request": check_request,
        "receiver": lambda data: receiver.run(machine_type, data),
        "inbox": lambda data: receiver.run(machine_type, data, has_inbox=True),
        "tls": tls.run,
        "stream_message": lambda data: check_frames("message", data),
        "stream_msgapp": lambda data: check_frames("msgapp", data),
    }[name]


def main() -> None:
    """Hand the process to libFuzzer, which calls the target."""
    name = sys.argv[1]
    machine_type = None
    if name in ("receiver", "inbox"):
        import _machine  # type: ignore[import-not-found]

        machine_type = _machine.Machine
    target = load(name, machine_type)
    fuzzer = ctypes.CDLL(None)

    def run_one(address: int, size: int) -> int:
        try:
            target(ctypes.string_at(address, size))
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os.abort()  # libFuzzer writes the input to a file
        return 0

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)(run_one)
    # The first word is what libFuzzer starts other processes of itself with, to merge.
    command = f"{sys.executable} -P -m tests.fuzz.targets {name}"
    words = [os.fsencode(word) for word in (command, *sys.argv[2:])]
    argc = ctypes.c_int(len(words))
    argv = ctypes.pointer((ctypes.c_char_p * (len(words) + 1))(*words, None))
    with receiver.InternalErrors.watched():
        status = fuzzer.LLVMFuzzerRunDriver(ctypes.byref(argc), ctypes.byref(argv), callback)
    os._exit(status)


if __name__ == "__main__":
    main()
