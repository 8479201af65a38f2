"""The body of a request that h11 has read the head of: where it ends, and what its framing is.

No sockets here. Messages and snapshots have their bodies read so where the core does not.
"""

from __future__ import annotations

from collections.abc import Mapping

import h11

from pipeline.wire._chunks import Chunks

__all__ = ["EVENTS_MAX", "RequestBody"]

#: What h11 makes of a body at once: an event takes it some 20 us, and others wait meanwhile.
EVENTS_MAX = 64


class RequestBody:
    """One body, in the pieces it comes in.

    Parameters
    ----------
    http : h11.Connection
        Has read the head, and no byte behind it. It reads what of a chunked body has more than
        sizes and data: extensions, trailers.
    headers : mapping
        Names in lower case; of a head that h11 has accepted.

    Attributes
    ----------
    left : int or None
        Bytes to come; None when that is not known, of a chunked body.
    is_whole : bool
        The end has come.
    is_busy : bool
        More can be read of what was given already: call ``read`` with nothing, after a pause.
    rest : bytes
        What came behind the body, once that is whole.
    events : int
        What h11 has made of it, since the head.

    Notes
    -----
    Used by one thread at a time.
    """

    def __init__(self, http: h11.Connection, headers: Mapping[str, str]) -> None:
        self._http = http
        is_chunked = "transfer-encoding" in headers
        self._chunks = Chunks() if is_chunked else None
        self.left = None if is_chunked else int(headers.get("content-length") or 0)
        self.is_whole = self.left == 0
        self.is_busy = False
        self.rest = b""
        self.events = 0
        #: The caller waits to be told to go on.
        self.is_waiting = http.they_are_waiting_for_100_continue

    def read(self, data: bytes | memoryview) -> bytes | bytearray | memoryview:
        """Take what has come; what of it is body.

        Bounded by the length of ``data``, and by ``EVENTS_MAX``. Raises ``RemoteProtocolError``
        when it is malformed.
        """
        if self.is_whole:
            self.rest += bytes(data)
            return b""
        if data:
            self.is_waiting = False
        if self._chunks is None:
            return self._read_length(data)
        if self._chunks.is_odd:
            return self._read_odd(data)
        return self._read_chunks(self._chunks, data)

    def go_on(self) -> bytes:
        """Return what to send to a caller that waits to be told to go on, once; else nothing."""
        if not self.is_waiting or self.is_whole:
            return b""
        self.is_waiting = False
        go_on = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
        return self._http.send(go_on) or b""

    def _read_chunks(self, chunks: Chunks, data: bytes | memoryview) -> bytearray:
        try:
            body = chunks.decode(data)
        except ValueError as error:
            raise h11.RemoteProtocolError(str(error)) from error
        if chunks.is_odd:
            # The framing has no memory: h11 goes on with the line as if it were the first one.
            self._http.receive_data(chunks.line + bytes(data[chunks.used :]))
            self.is_busy = True
        elif chunks.is_whole:
            self.is_whole = True
            self.rest = bytes(data[chunks.used :])
        return body

    def _read_length(self, data: bytes | memoryview) -> bytes | memoryview:
        assert self.left is not None
        body = data[: self.left]
        if len(body) == self.left:
            self.is_whole = True
            self.rest = bytes(data[self.left :])
        self.left -= len(body)
        return body

    def _read_odd(self, data: bytes | memoryview) -> bytes:
        if data:
            self._http.receive_data(bytes(data))
        parts = []
        self.is_busy = True
        for _ in range(EVENTS_MAX):
            event = self._http.next_event()
            self.events += 1
            if isinstance(event, h11.Data):
                parts.append(bytes(event.data))
                continue
            self.is_busy = False
            if isinstance(event, h11.EndOfMessage):
                self.is_whole = True
                self.rest = self._http.trailing_data[0]
            break
        return b"".join(parts)
