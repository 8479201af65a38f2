"""Generated protobuf classes of raftpb, in ``raft_pb2``.

``pipeline`` itself does not import them: they cost the import of protobuf.
"""
