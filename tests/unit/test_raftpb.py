"""The generated protobuf classes: up to date, and alone with their names in a process."""

import importlib.util
import pickle
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf import descriptor_pb2

from pipeline.examples import etcd_log_pb2
from pipeline.raftpb import raft_pb2
from pipeline.types import EntryType, MessageType
from tests.support.processes import ROOT, TIMEOUT_S

GENERATOR_LINE = "# Protobuf Python Version: "

#: The generated modules, each with its .proto and the folder that this is named from.
each_module = pytest.mark.parametrize(
    ("module", "proto", "root"),
    [
        (raft_pb2, "pipeline/raftpb/raft.proto", Path(raft_pb2.__file__).parents[2]),
        (etcd_log_pb2, "examples/etcd_log.proto", ROOT),
    ],
    ids=["raft", "etcd_log"],
)


def checked_in(module: ModuleType) -> dict[str, str]:
    """Text by file name, of the classes and of their types."""
    path = Path(str(module.__file__))
    return {each.name: each.read_text() for each in (path, path.with_suffix(".pyi"))}


def generator_of(text: str) -> str:
    """The version of protobuf whose compiler wrote the file."""
    return next(line for line in text.splitlines() if line.startswith(GENERATOR_LINE))


def clear_json_names(messages: Iterable[descriptor_pb2.DescriptorProto]) -> None:
    """Of what one output of the compiler has and the other has not."""
    for message in messages:
        for field in message.field:
            field.ClearField("json_name")
        clear_json_names(message.nested_type)


@each_module
@pytest.mark.skipif(
    importlib.util.find_spec("grpc_tools") is None,
    reason="grpcio-tools, which has the protobuf compiler, is not installed",
)
def test_the_checked_in_classes_are_what_the_proto_says(
    tmp_path: Path, module: ModuleType, proto: str, root: Path
) -> None:
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi")]
    outputs.append(f"--descriptor_set_out={tmp_path}/set")
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{root}", *outputs, proto],
        check=True,
        capture_output=True,
        timeout=TIMEOUT_S,
    )
    (from_proto,) = descriptor_pb2.FileDescriptorSet.FromString(
        (tmp_path / "set").read_bytes()
    ).file
    clear_json_names(from_proto.message_type)
    ours = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(ours)
    assert ours == from_proto
    texts = checked_in(module)
    written = (tmp_path / proto).parent
    fresh = {name: (written / name).read_text() for name in texts}
    classes = f"{module.__name__.rpartition('.')[2]}.py"
    if generator_of(fresh[classes]) == generator_of(texts[classes]):
        assert fresh == texts


@each_module
def test_the_classes_load_on_the_oldest_protobuf_we_allow(
    module: ModuleType, proto: str, root: Path
) -> None:
    # pyproject.toml asks for 6.31; a runtime refuses classes newer than itself.
    text = generator_of(Path(str(module.__file__)).read_text())
    version = tuple(int(part) for part in text.removeprefix(GENERATOR_LINE).split("."))
    assert version <= (6, 31, 0)


def test_enums_have_the_numbers_of_ours() -> None:
    assert sorted(raft_pb2.MessageType.values()) == sorted(MessageType)
    assert sorted(raft_pb2.EntryType.values()) == sorted(EntryType)


def test_enums_are_open() -> None:
    message = raft_pb2.Message.FromString(b"\x08\x63")
    assert message.type == 99
    assert message.SerializeToString() == b"\x08\x63"


def test_absent_and_zero_are_told_apart() -> None:
    message = raft_pb2.Message(logTerm=0, context=b"")
    assert message.SerializeToString() == b"\x28\x00\x62\x00"
    assert message.HasField("logTerm")
    assert not message.HasField("term")


def test_lists_of_ids_are_not_packed() -> None:
    assert raft_pb2.ConfState(learners=[1, 2]).SerializeToString() == b"\x10\x01\x10\x02"


def test_objects_can_be_pickled() -> None:
    message = raft_pb2.Message(type="MsgApp", to=2)
    assert pickle.loads(pickle.dumps(message)) == message


SCRIPT_WITH_ANOTHER_RAFTPB = """
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

def load_theirs():
    # etcd's file under the names it has been generated with.
    pool = descriptor_pool.Default()
    for name in ("raft.proto", "raftpb/raft.proto"):
        file = descriptor_pb2.FileDescriptorProto(
            name=name, package="raftpb" if name == "raft.proto" else "other", syntax="proto2"
        )
        for message in ("Entry", "Snapshot", "Message", "HardState", "ConfState", "ConfChange"):
            file.message_type.add(name=message).field.add(
                name="text", number=1, type="TYPE_STRING", label="LABEL_OPTIONAL"
            )
        file.enum_type.add(name="MessageType").value.add(name="MsgHup", number=0)
        pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("raftpb.Message"))

def load_ours():
    from pipeline.raftpb.raft_pb2 import Message
    return Message

ORDER
assert theirs(text="x").SerializeToString() == b"\\x0a\\x01x"
assert ours(to=2).SerializeToString() == b"\\x10\\x02"
"""


@pytest.mark.parametrize(
    "order",
    ["theirs = load_theirs(); ours = load_ours()", "ours = load_ours(); theirs = load_theirs()"],
    ids=["theirs first", "ours first"],
)
def test_etcds_own_classes_can_be_in_the_same_process(order: str) -> None:
    script = SCRIPT_WITH_ANOTHER_RAFTPB.replace("ORDER", order)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_pipeline_does_not_import_protobuf() -> None:
    script = "import sys, pipeline.wire._messages; print('google.protobuf' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.stdout == "False\n"
