"""The public names are there, and importing them costs no more than it must."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

import pipeline
from tests.support.processes import TIMEOUT_S

NAMES = """
    Message Entry Snapshot SnapshotMetadata ConfState MessageType EntryType SnapshotStatus
    SendResult EncodedMessage Raft Pipeline PipelineStats PipelineConfig Transport Listener
    URLPicker PeerStatus TransportConfig ReceiverConfig PipelineError UsageError MarshalError
    UnmarshalError PostError PeerUnreachableError UnexpectedStatusError IncompatibleVersionError
    ClusterIDMismatchError MemberRemovedError InternalError RequestRejected SnapshotTransfer
    PeerChange PeerState format_id parse_id
"""

MEMBERS = {
    "Pipeline": "start send stop stats __enter__ __exit__",
    "PipelineStats": "offered accepted refused sent failed dropped queued in_flight sent_bytes "
    "queued_bytes",
    "PipelineConfig": "connections queue_length",
    "Transport": "start stop send send_snapshot listen add_peer update_peer remove_peer "
    "remove_all_peers active_since active_peers stats metrics_collector asgi_app",
    "SnapshotTransfer": "progress cancel result done add_done_callback",
    "SnapshotProgress": "phase sent_bytes total_bytes rate_bytes_per_s",
    "Listener": "close",
    "PeerChange": "member_id state reason",
    "PeerState": "ACTIVE INACTIVE MISMATCHED REMOVED",
    "Raft": "process is_id_removed report_unreachable report_snapshot",
    "Message": "type to from_ term log_term index entries commit snapshot reject reject_hint "
    "context marshal unmarshal byte_size",
    "Entry": "term index type data",
    "Snapshot": "data metadata",
    "SnapshotMetadata": "conf_state index term",
    "ConfState": "voters learners",
}


@pytest.mark.parametrize("name", NAMES.split())
def test_a_name_of_the_contract_is_public(name: str) -> None:
    assert name in pipeline.__all__
    assert getattr(pipeline, name).__name__ == name


@pytest.mark.parametrize(
    ("owner", "member"),
    [(owner, member) for owner, members in MEMBERS.items() for member in members.split()],
)
def test_a_member_of_the_contract_is_there(owner: str, member: str) -> None:
    cls = getattr(pipeline, owner)
    assert hasattr(cls, member) or member in getattr(cls, "__annotations__", ())


def test_all_is_sorted_whole_and_true() -> None:
    assert list(pipeline.__all__) == sorted(pipeline.__all__)
    for name in pipeline.__all__:
        assert hasattr(pipeline, name)


def test_enumerations_have_the_wire_s_numbers() -> None:
    assert (pipeline.SnapshotStatus.FINISH, pipeline.SnapshotStatus.FAILURE) == (1, 2)
    assert [result.name for result in pipeline.SendResult] == ["ACCEPTED", "QUEUE_FULL", "STOPPED"]
    assert pipeline.MessageType.SNAP == 7


def test_the_protobuf_classes_are_where_the_contract_says() -> None:
    from pipeline.raftpb import raft_pb2

    assert raft_pb2.Message(term=1).term == 1


#: Slow to import, and not needed by a program that only has messages to encode.
NOT_IMPORTED = """
    asyncio ssl h11 urllib3 http.client concurrent.futures google.protobuf uvicorn click rich
    prometheus_client pipeline.aio pipeline.transport pipeline.receive.listener
"""
#: What a node that only sends has no use for, either.
NOT_IMPORTED_TO_SEND = """
    asyncio h11 google.protobuf uvicorn click rich prometheus_client pipeline.aio
    pipeline.receive.listener pipeline.receive.asgi pipeline.receive.wsgi
"""


@pytest.mark.parametrize(
    ("statement", "modules"),
    [
        ("import pipeline", NOT_IMPORTED),
        ("from pipeline import Transport", NOT_IMPORTED_TO_SEND),
    ],
    ids=["pipeline", "Transport"],
)
def test_what_is_imported_is_what_is_used(statement: str, modules: str) -> None:
    code = f"import sys; {statement}; print(*sorted(sys.modules.keys() & {set(modules.split())}))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=TIMEOUT_S
    )
    assert result.stdout.split() == []
    for module in modules.split():
        assert not module.startswith("pipeline.") or importlib.util.find_spec(module) is not None


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Transports'"):
        _ = pipeline.Transports  # type: ignore[attr-defined]
    assert set(pipeline.__all__) <= set(dir(pipeline))


def test_importing_pipeline_starts_no_thread_and_says_nothing() -> None:
    code = (
        "import os; before = len(os.listdir('/proc/self/task'))\n"
        "import pipeline; print(len(os.listdir('/proc/self/task')) - before)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        check=True,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert (result.stdout, result.stderr) == ("0\n", "")
