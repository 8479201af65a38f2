"""The nodes of ``examples/`` as a user runs them: on ``selectors``, trio, FastAPI, beside etcd."""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import urllib3

from pipeline.examples import json_logging
from pipeline.examples.etcd import free_port
from pipeline.logs import FIELDS
from tests.support.processes import TIMEOUT_S, Program
from tests.support.server import refused_port
from tests.support.waiting import eventually

EXAMPLES = "pipeline.examples."


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


# -- an election, on selectors and on trio


def ask(program: Program) -> tuple[int, int]:
    """Return who leads, and in which term, as a node tells its clients."""
    host, port = program.wait_line(r"clients: (.*):(\d+)").groups()
    with socket.create_connection((host, int(port)), TIMEOUT_S) as client:
        told = client.makefile().read()
    found = re.fullmatch(r"member \d: (\d|nobody) leads in term (\d+)\n", told)
    assert found, told
    return 0 if found[1] == "nobody" else int(found[1]), int(found[2])


def agreed(programs: dict[int, Program]) -> tuple[int, int]:
    """Wait until nodes tell of the same leader, one of them; who it is and in which term."""
    told: set[tuple[int, int]] = set()

    def is_agreed() -> bool:
        told.clear()
        told.update(ask(program) for program in programs.values())
        return len(told) == 1 and {leader for leader, _ in told} <= programs.keys()

    eventually(is_agreed, lambda: f"they agree: {told}")
    (state,) = told
    return state


@pytest.mark.parametrize(
    "kinds",
    [("selectors", "selectors", "selectors"), ("trio", "trio", "selectors")],
    ids=["selectors", "trio"],
)
def test_nodes_elect_another_leader_when_theirs_is_killed(
    stack: ExitStack, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    urls = [f"http://127.0.0.1:{free_port()}" for _ in kinds]

    def start(member_id: int) -> Program:
        module = f"{EXAMPLES}{kinds[member_id - 1]}_node"
        path = str(tmp_path / f"{member_id}.log")
        return stack.enter_context(Program(module, str(member_id), path, *urls))

    programs = {member_id: start(member_id) for member_id in (1, 2, 3)}
    leader, term = agreed(programs)
    killed = programs.pop(leader)
    killed.process.kill()
    killed.process.wait()
    _, later = agreed(programs)
    assert later > term
    programs[leader] = start(leader)
    agreed(programs)
    assert [program.terminate() for program in programs.values()] == [0, 0, 0]


# -- a service on FastAPI


def test_what_is_written_to_the_service_is_read_from_every_node(
    stack: ExitStack, tmp_path: Path
) -> None:
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(3)]

    def start(member_id: int) -> Program:
        path = str(tmp_path / f"{member_id}.log")
        return stack.enter_context(
            Program(f"{EXAMPLES}fastapi_node", str(member_id), path, "0", *urls)
        )

    def service(program: Program) -> str:
        return program.wait_line(r"running on (http://\S+)")[1]

    http = stack.enter_context(urllib3.PoolManager(timeout=TIMEOUT_S, retries=False))

    def put(program: Program, key: str, value: str) -> tuple[int, Any]:
        answer = http.request("PUT", f"{service(program)}/keys/{key}", json=value)
        return answer.status, answer.json()

    def get(program: Program, key: str) -> tuple[int, Any]:
        answer = http.request("GET", f"{service(program)}/keys/{key}")
        return answer.status, answer.json()

    one, two, three = programs = [start(member_id) for member_id in (1, 2, 3)]
    assert get(one, "colour")[0] == 404
    assert put(one, "colour", "red") == (200, 1)
    assert get(one, "colour") == (200, "red")
    for program in programs:
        eventually(lambda program=program: get(program, "colour") == (200, "red"), "it is red")
    assert put(two, "colour", "blue") == (421, {"detail": "member 1 leads"})

    three.process.kill()
    three.process.wait()
    for n in range(20):
        assert put(one, f"key {n}", f"value {n}") == (200, n + 2)
    assert put(one, "colour", "blue") == (200, 22)
    three = start(3)
    eventually(lambda: get(three, "colour") == (200, "blue"), "it has caught up")
    assert [get(three, f"key {n}") for n in range(20)] == [(200, f"value {n}") for n in range(20)]

    # The leader does not know what has been missed, when it has been away itself.
    three.process.kill()
    three.process.wait()
    assert put(one, "colour", "green") == (200, 23)
    assert one.terminate() in (0, -signal.SIGTERM)  # as uvicorn has it
    three = start(3)
    service(three)
    one = start(1)
    eventually(lambda: get(three, "colour") == (200, "green"), "it is green")
    assert put(one, "colour", "white") == (200, 24)
    for program in (one, two, three):
        assert program.terminate() in (0, -signal.SIGTERM)
        assert "Traceback" not in "\n".join(program.lines)


# -- a learner of an etcd, which tests/interop has


def test_a_feed_that_finds_no_etcd_says_where_it_has_looked() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with refused_port() as one, refused_port() as two:
        clients = [f"http://127.0.0.1:{port}" for port in (one, two)]
        with Program(f"{EXAMPLES}change_feed", "--listen", url, *clients) as program:
            assert program.process.wait(TIMEOUT_S) == 1
            for client in clients:
                program.wait_line(f"^{client}: .*refused")
        assert "Traceback" not in "\n".join(program.lines)


# -- logs as JSON


def test_logs_are_json_with_the_fields_of_the_library() -> None:
    assert json_logging.FIELDS == FIELDS
    with Program(f"{EXAMPLES}json_logging") as program:
        program.wait_line("stopped HTTP pipelining")
        assert program.process.wait(TIMEOUT_S) == 0
        lines = [json.loads(line) for line in program.lines]
    for line in lines:
        assert {"time", "level", "logger", "message"} <= line.keys()
        assert line["local"] == "a1"
    (failure,) = [line for line in lines if line["level"] == "warning"]
    assert failure["url"] == "http://127.0.0.1:1"
    assert failure["reason"] == "127.0.0.1:1: Connection refused"
    assert (failure["peer"], failure["verdict"]) == ("b2", "refused")


def test_a_traceback_and_a_line_of_another_library_are_json_as_well() -> None:
    formatter = json_logging.JSONFormatter()
    try:
        int("x")
    except ValueError:
        record = logging.LogRecord("other", 40, __file__, 1, "%s!", ("it",), sys.exc_info())
    line = json.loads(formatter.format(record))
    assert (line["message"], line["level"]) == ("it!", "error")
    assert line["traceback"].endswith("invalid literal for int() with base 10: 'x'")
    assert line.keys() == {"time", "level", "logger", "message", "traceback"}
