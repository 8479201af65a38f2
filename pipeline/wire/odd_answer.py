"""An answer that the core did not recognise, read by ``http.client`` from the pieces it comes in.

No sockets here. Messages, snapshots and probes have their answers read so.
"""

from __future__ import annotations

import http.client
import io
import re
import socket
from collections.abc import Mapping
from http.client import NO_CONTENT, SWITCHING_PROTOCOLS
from typing import NamedTuple, Self, cast

__all__ = ["TEXT_TIMEOUT_S", "OddAnswer", "PeerAnswer"]

#: Of a body no more is read than this: the texts that mean something are under 100 bytes.
BODY_MAX = 64 * 1024
#: An answer that is not complete after this many bytes, interim answers included, is given up.
ANSWER_MAX = 128 * 1024
#: A chunked text may end wherever a line is empty; so often is looked whether it has.
LOOKS_MAX = 8
#: How long the text of an answer is waited for once its head has come. A peer writes both at once.
TEXT_TIMEOUT_S = 1.0

# The end of an empty line, where http.client sees the end of a head, and of a chunked body.
_EMPTY_LINE = re.compile(rb"(?<=\n)\n|(?<=\n\r)\n")


class PeerAnswer(NamedTuple):
    """An answer; ``keep`` says that the connection is fit for another."""

    status: int
    #: Names in lower case.
    headers: Mapping[str, str]
    #: As much of it as came with the head; the whole of it for the status whose text we wait for.
    body: bytes
    keep: bool


class _MoreNeededError(Exception):
    """The bytes end within the answer, and the connection has not ended."""


class _Received(io.BytesIO):
    """What has been received of an answer, as the file ``http.client`` reads from."""

    def __init__(self, data: bytes | bytearray, *, is_ended: bool) -> None:
        super().__init__(data)
        self.is_cut = False  # the connection ended where http.client wanted more
        self.is_ended = is_ended

    def append(self, data: bytes | bytearray) -> None:
        at = self.tell()
        self.seek(0, io.SEEK_END)
        self.write(data)
        self.seek(at)

    def makefile(self, _mode: str) -> Self:
        return self

    def close(self) -> None:
        """Stay open for the body that is appended, and to tell how much was read."""

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n") and len(line) != size:
            self._end()
        return line

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if size is None or size < 0 or len(data) < size:
            self._end()
        return data

    def _end(self) -> None:
        if not self.is_ended:
            raise _MoreNeededError
        self.is_cut = True


class OddAnswer:
    """The answer to one request after the other, on its way in.

    Parameters
    ----------
    telling : int
        The status whose text means something: 412 of a POST, 200 of a probe. It is waited for. Of
        any other answer the status decides as soon as the head is there: a member that breaks off
        its answer, as etcd does with a 500, must not hold up whoever reads it.

    Notes
    -----
    Not thread-safe. However small the pieces, each byte is looked at a bounded number of times:
    ``http.client`` is asked when a head is whole, and not before; interim answers (1xx) are let go
    of one by one.
    """

    def __init__(self, telling: int) -> None:
        self._telling = telling
        self.clear()

    def clear(self) -> None:
        """Forget what has come; the next byte is the first of an answer."""
        self._data = bytearray()  # of the final answer, or of an interim one that is not whole
        #: Bytes that have come, of interim answers as well.
        self.total = 0
        self._searched = 0  # of the data, for the end of the head or of a chunk
        self._head_len = 0  # of a head that is whole
        self._wanted = 0  # of the data: before, the text cannot be whole
        self._looks = 0

    @property
    def has_begun(self) -> bool:
        """Whether anything has come, be it a part of an interim answer."""
        return self.total > 0

    @property
    def is_final(self) -> bool:
        """Whether a part of the final answer has come."""
        return bool(self._data) and not self._data.startswith(b"HTTP/1.1 1")

    @property
    def is_text_due(self) -> bool:
        """Whether the head has come, and a text that is not whole is waited for."""
        return self._head_len > 0

    def feed(self, data: bytes, *, is_ended: bool, is_written: bool) -> PeerAnswer | None:
        """Take what has come.

        Parameters
        ----------
        data : bytes
            Following what the last call was given.
        is_ended : bool
            Whether there will be no more: the peer has ended the stream, or it is waited for no
            longer.
        is_written : bool
            Whether the request was written whole; otherwise the connection is not fit for another.

        Returns
        -------
        PeerAnswer or None
            None when more has to come. After an answer the next one can be fed.

        Raises
        ------
        http.client.HTTPException
            If it is malformed, or cut off within its head, or too long.
        """
        self._data += data
        self.total += len(data)
        answer = None
        while answer is None and self._is_due(is_ended=is_ended):
            answer = self._read(is_ended=is_ended, is_written=is_written)
        if answer is not None:
            self.clear()
        elif self.total > ANSWER_MAX:
            raise http.client.HTTPException("answer too long")
        return answer

    def _is_due(self, *, is_ended: bool) -> bool:
        """Tell whether there is something for ``_read``: a head that is whole, or a text."""
        if is_ended and self._head_len:
            return True
        if self._wanted:
            return len(self._data) >= self._wanted
        searched, self._searched = self._searched, len(self._data)
        found = _EMPTY_LINE.search(self._data, searched)
        if self._head_len:  # and a chunked text
            return found is not None
        if found is not None:
            self._head_len = found.end()
            return True
        is_line = self._data.find(b"\n", searched) >= 0 > self._data.find(b"\n", 0, searched)
        if is_ended or is_line:
            # What does not begin like an answer is not waited for, be it ended or not.
            self._read_part(is_ended=is_ended)
        return False

    def _read_part(self, *, is_ended: bool) -> None:
        """Have an error raised if what is there of a head cannot become one."""
        received = _Received(self._data, is_ended=is_ended)
        try:
            _response(received).begin()
        except _MoreNeededError:
            return
        raise http.client.HTTPException("the connection ended within the head of the answer")

    def _read(self, *, is_ended: bool, is_written: bool) -> PeerAnswer | None:
        """Read the answer whose head is whole; None if it is interim, or its text is not whole."""
        received = _Received(self._data[: self._head_len], is_ended=False)
        response = _response(received)
        try:
            response.begin()
        except _MoreNeededError:  # of a 100, which http.client passes over by itself
            is_interim = True
        else:
            is_interim = response.status < 200 and response.status != SWITCHING_PROTOCOLS
        if is_interim:
            del self._data[: self._head_len]
            self._head_len = self._searched = 0
            return None
        received.append(self._data[self._head_len :])
        received.is_ended = is_ended
        is_whole, body = True, b""
        try:
            # A 204 has no body, whatever its headers say (RFC 9112 6.3).
            if response.status != NO_CONTENT:
                body = response.read(BODY_MAX)
                is_whole = response.isclosed()
        except _MoreNeededError:
            if response.status == self._telling:
                self._wait_for_text(response)
                return None
            is_whole = False
        except http.client.HTTPException as error:  # of the body: the status is known
            is_whole, body = False, getattr(error, "partial", b"")
        is_plain = response.status != NO_CONTENT or not (
            response.chunked or response.getheader("Content-Length", "0") != "0"
        )
        keep = (
            is_written
            and is_plain
            and is_whole
            and not is_ended
            and not response.will_close
            and received.tell() == len(self._data)
        )
        headers = {name.lower(): value for name, value in response.getheaders()}
        return PeerAnswer(response.status, headers, body, keep)

    def _wait_for_text(self, response: http.client.HTTPResponse) -> None:
        """Note when it is worth while to look again."""
        if response.chunked:
            self._searched = len(self._data)
            self._looks += 1
            if self._looks > LOOKS_MAX:
                raise http.client.HTTPException("answer in too many pieces")
        else:
            length = BODY_MAX if response.length is None else min(response.length, BODY_MAX)
            self._wanted = self._head_len + length


def _response(received: _Received) -> http.client.HTTPResponse:
    # HTTPResponse wants a socket only to call makefile on it.
    return http.client.HTTPResponse(cast(socket.socket, received), method="POST")
