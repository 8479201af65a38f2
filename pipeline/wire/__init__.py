"""Bytes: raftpb, heads and framing of HTTP, what rafthttp puts into them. Knows no socket."""
