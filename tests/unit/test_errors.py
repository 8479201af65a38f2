"""The error tree: who is at fault, what an error carries, and that it travels."""

from __future__ import annotations

import copy
import pickle

import pytest

from pipeline import errors
from pipeline.errors import (
    ClusterIDMismatchError,
    MarshalError,
    MemberRemovedError,
    PipelineError,
    PostError,
    RequestRejected,
    UnmarshalError,
    UsageError,
)

ALL = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("error", ALL)
def test_everything_is_a_pipeline_error(error: type[Exception]) -> None:
    assert issubclass(error, PipelineError)


@pytest.mark.parametrize("error", [UsageError, MarshalError, UnmarshalError])
def test_bad_values_are_value_errors_too(error: type[Exception]) -> None:
    assert issubclass(error, ValueError)


@pytest.mark.parametrize(
    "name",
    [
        "PeerUnreachableError",
        "UnexpectedStatusError",
        "IncompatibleVersionError",
        "ClusterIDMismatchError",
        "MemberRemovedError",
    ],
)
def test_what_the_peer_or_the_network_did_is_a_post_error(name: str) -> None:
    assert issubclass(getattr(errors, name), PostError)


@pytest.mark.parametrize("travel", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize(
    "error",
    [
        UsageError("urls: 'x': must be host:port"),
        UnmarshalError("Message.entries.data", 17, "a length past the end"),
        MemberRemovedError("removed", peer_id=2, url="http://a:1/raft", status=403),
        ClusterIDMismatchError("m", peer_id=2, url="u", status=412, remote_cluster_id="cd"),
        RequestRejected(418, b"no", "text/html"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_can_be_copied_and_pickled(error: PipelineError, travel: object) -> None:
    twin = travel(error)  # type: ignore[operator]
    assert type(twin) is type(error)
    assert str(twin) == str(error)
    assert vars(twin) == vars(error)


def test_unmarshal_error_names_field_and_offset() -> None:
    error = UnmarshalError("Message.term", 3, "the input ends inside a value")
    assert str(error) == "Message.term at offset 3: the input ends inside a value"
    assert (error.field, error.offset) == ("Message.term", 3)


@pytest.mark.parametrize("status", [199, 600, 0, -1, 200.0, "200", None, True])
def test_a_rejection_needs_a_final_status(status: int) -> None:
    with pytest.raises(UsageError, match="status: "):
        RequestRejected(status)


@pytest.mark.parametrize("status", [200, 599])
def test_a_rejection_takes_every_final_status(status: int) -> None:
    assert RequestRejected(status).status == status


@pytest.mark.parametrize(
    "content_type", ["text/plain\r\nX-Evil: 1", "text/plain\n", "tä/x", "a\x00"]
)
def test_a_rejection_cannot_smuggle_a_header(content_type: str) -> None:
    with pytest.raises(UsageError, match="content_type: "):
        RequestRejected(500, b"", content_type)


@pytest.mark.parametrize("body", ["text", None, bytearray(b"x")])
def test_the_body_of_a_rejection_is_bytes(body: bytes) -> None:
    with pytest.raises(UsageError, match="body: "):
        RequestRejected(500, body)
