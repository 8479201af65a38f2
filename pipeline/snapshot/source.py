"""Where a snapshot's database comes from: a file or chunks, of exactly the length declared.

Source: etcd ``ioutil.NewExactReadCloser``, ``snap.Message``. What follows the last byte is looked
at before that byte is given out: with a Content-Length the receiver would take the snapshot for
whole otherwise.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, cast

from pipeline.arguments import absolute_path, require_whole
from pipeline.callbacks import require_no_awaitable
from pipeline.errors import SnapshotSourceError, UsageError
from pipeline.logs import show
from pipeline.wire._messages import byte_view

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "BufferSource",
    "ChunkSource",
    "FileSource",
    "SnapshotSource",
    "UnsendableError",
    "close_quietly",
    "open_source",
]

#: What ``Transport.send_snapshot`` takes: a path, a binary file, a buffer, or an iterable of those.
#: ``bytes`` are a buffer, not a path.
SnapshotSource: TypeAlias = "str | os.PathLike[str] | BinaryIO | Buffer | Iterable[Buffer]"

#: A file that cannot go out by ``sendfile`` is read in pieces of this size.
CHUNK_BYTES = 256 * 1024
#: No file is larger, and so no source.
SIZE_MAX = (1 << 63) - 1


# What a kernel says of a file that it cannot write to a socket by itself: a file system without
# splice, a kernel or a sandbox without sendfile. It may also be the socket's; then reading and
# sending finds it out.
_NO_SENDFILE = frozenset((errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM))


class UnsendableError(Exception):
    """The kernel does not write this file to a socket; it can be read and sent."""


class FileSource:
    """A regular file, from an offset on. Its own position is not moved.

    Parameters
    ----------
    fd : int
        Borrowed until ``close``.
    offset, size : int
        Which bytes of it.
    close : callable
    """

    def __init__(self, fd: int, offset: int, size: int, close: Callable[[], object]) -> None:
        self.fd = fd
        self.offset = offset
        self.size = size
        self.close = close

    def chunks(self, done: int = 0) -> Iterator[memoryview]:
        """Yield all of it from byte ``done`` on; a chunk is valid until the next is asked for."""
        buffer = memoryview(bytearray(min(CHUNK_BYTES, max(1, self.size - done))))
        while done < self.size:
            want = min(len(buffer), self.size - done)
            if done + want == self.size:
                self.require_end()
            n = self._read(buffer[:want], done)
            if n == 0:
                raise _short(done, self.size)
            done += n
            yield buffer[:n]

    def send(self, sock_fd: int, done: int, count: int) -> int:
        """Have the kernel write ``count`` bytes, or fewer, to a socket, from byte ``done`` on.

        Raises ``OSError`` for the socket's reasons, ``SnapshotSourceError`` for the file's, and
        ``UnsendableError`` if the kernel does not do this.
        """
        try:
            with sigpipe_blocked():
                n = os.sendfile(sock_fd, self.fd, self.offset + done, count)
        except BlockingIOError:
            raise
        except OSError as error:
            # It does not say whose it is. If the file can be read at that place, it is not its.
            if self._read(memoryview(bytearray(1)), done) == 0:
                raise _short(done, self.size) from error
            if error.errno in _NO_SENDFILE:
                raise UnsendableError(error.strerror) from error
            raise
        if n == 0:
            raise _short(done, self.size)
        return n

    def require_end(self) -> None:
        """Raise ``SnapshotSourceError`` if the file goes on behind the bytes declared."""
        if self._read(memoryview(bytearray(1)), self.size):
            raise _long(self.size)

    def _read(self, buffer: memoryview, at: int) -> int:
        try:
            return os.preadv(self.fd, [buffer], self.offset + at)
        except OSError as error:
            raise SnapshotSourceError(f"the source cannot be read: {error}") from error


class BufferSource:
    """One buffer, borrowed until ``close``. Its memory is read by who writes it, not here.

    Parameters
    ----------
    view : memoryview
        Its bytes.
    size : int
        Bytes declared.
    owner : object
        Closed, if it can be and nobody else uses it.
    """

    def __init__(self, view: memoryview, size: int, owner: object) -> None:
        self.size = size
        self._view = view
        self._owner = owner

    def chunks(self) -> Iterator[memoryview]:
        """Yield it; ``SnapshotSourceError`` if it is not as long as declared."""
        self.require_end()
        if self.size > len(self._view):
            raise _short(len(self._view), self.size)
        if self.size:
            yield self._view

    def require_end(self) -> None:
        """Raise ``SnapshotSourceError`` if it is longer than declared."""
        if len(self._view) > self.size:
            raise _long(self.size)

    def close(self) -> None:
        """Give it back."""
        self._view.release()
        with contextlib.suppress(BufferError):
            _closing(self._owner)()


class ChunkSource:
    """Buffers from an iterator, each borrowed until the next one is asked for.

    Parameters
    ----------
    chunks : iterator
    size : int
        Bytes in all.
    close : callable
    """

    def __init__(self, chunks: Iterator[object], size: int, close: Callable[[], object]) -> None:
        self.size = size
        self._close = close
        self._iterator = chunks
        self._chunk = memoryview(b"")

    def chunks(self) -> Iterator[memoryview]:
        """Yield all of it; ``SnapshotSourceError`` if it is not as declared, or raises."""
        left = self.size
        while left:
            chunk = self._next()
            if chunk is None:
                raise _short(self.size - left, self.size)
            left -= len(chunk)
            if left < 0:
                raise _long(self.size)
            if left == 0:
                # What follows is asked for while nothing is lent: a source may have one buffer,
                # which it fills again and again.
                last = bytes(chunk[-1:])
                self._lend(chunk[:-1])
                yield self._chunk
                self.require_end()
                chunk = memoryview(last)
            yield chunk

    def require_end(self) -> None:
        """Raise ``SnapshotSourceError`` if there is more."""
        if self._next() is not None:
            raise _long(self.size)

    def close(self) -> None:
        """Give back what is borrowed, and close what can be closed."""
        self._chunk.release()
        self._close()

    def _lend(self, chunk: memoryview) -> None:
        """Lend a chunk instead of the one before."""
        self._chunk.release()
        self._chunk = chunk

    def _next(self) -> memoryview | None:
        """Return the next chunk that is not empty; None at the end."""
        self._chunk.release()
        try:
            for chunk in self._iterator:
                if not isinstance(chunk, (bytes, bytearray, memoryview)):
                    require_no_awaitable("source", chunk)  # of a file for asyncio
                self._lend(byte_view(cast(bytes, chunk)))
                if self._chunk:
                    return self._chunk
        except BaseException as error:  # also sys.exit(): nobody else's business in our thread
            raise SnapshotSourceError(f"the source raised {show(error)}") from error
        return None


@contextlib.contextmanager
def sigpipe_blocked() -> Iterator[None]:
    """Have this thread spared the SIGPIPE of a ``sendfile``, which takes no MSG_NOSIGNAL.

    Python ignores the signal, but an application may have put it back to ending the process. It is
    blocked for the one call only: a mask that stays would be inherited by what a callback starts.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
    try:
        yield
    finally:
        if signal.SIGPIPE not in before:
            # Sent also where the call wrote something before the peer was gone, and did not fail.
            signal.sigtimedwait({signal.SIGPIPE}, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _short(got: int, size: int) -> SnapshotSourceError:
    return SnapshotSourceError(f"the source ended after {got} of {size} bytes")


def _long(size: int) -> SnapshotSourceError:
    return SnapshotSourceError(f"the source has more than the {size} bytes declared")


def open_source(
    source: SnapshotSource, size: int | None
) -> FileSource | BufferSource | ChunkSource:
    """Make one kind or another of what the application gave.

    Raises
    ------
    UsageError
        If it is no source, or its size cannot be found out and was not given.
    OSError
        If the file cannot be opened.
    """
    if size is not None:
        require_whole("size", size, 0, SIZE_MAX)
    if isinstance(source, (str, os.PathLike)):
        return _open_path(source, size)
    # Before it is looked at as a file: an mmap is both.
    view = _view_of(source)
    if view is not None:
        return BufferSource(view, len(view) if size is None else size, source)
    if hasattr(source, "read"):
        return _open_file(source, size)
    if not isinstance(source, Iterable):
        raise UsageError(
            f"source: {show(source)} is no path, binary file, buffer or iterable of buffers"
        )
    if size is None:
        raise UsageError("size: is needed for an iterable")
    iterator = iter(source)
    return ChunkSource(iterator, size, _closing(source, iterator))


def close_quietly(source: object) -> None:
    """Close what was refused, if it can be; what that raises is of no interest any more."""
    with contextlib.suppress(Exception):
        _closing(source)()


def _open_path(given: str | os.PathLike[str], size: int | None) -> FileSource:
    path = absolute_path("source", given)
    # Not blocking: a FIFO would wait for a writer.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise UsageError(f"source: {show(given)} is not a regular file")
    file = io.FileIO(fd, "rb")
    return FileSource(fd, 0, found.st_size if size is None else size, file.close)


def _view_of(source: object) -> memoryview | None:
    """Return the bytes of a buffer; None for what is none."""
    try:
        return byte_view(cast(bytes, source))
    except TypeError:
        return None
    except (BufferError, ValueError) as error:
        raise UsageError(f"source: {show(source)} is no C-contiguous buffer: {error}") from error


def _open_file(file: Any, size: int | None) -> FileSource | ChunkSource:
    if isinstance(file, io.TextIOBase):
        raise UsageError("source: is a text file; open it in binary mode")
    if getattr(file, "closed", False) is True:
        raise UsageError(f"source: {show(file)} is closed")
    # Only of Python's own files is it known that their descriptor is what they read: GzipFile,
    # for one, has the descriptor of what is compressed.
    raw = file.raw if isinstance(file, (io.BufferedReader, io.BufferedRandom)) else file
    if isinstance(raw, io.FileIO):
        if not raw.readable():
            raise UsageError(f"source: {show(file)} is not open for reading")
        if stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
            file.flush()
            offset = file.tell()
            rest = max(0, os.fstat(raw.fileno()).st_size - offset)
            return FileSource(raw.fileno(), offset, rest if size is None else size, file.close)
    if size is None:
        size = _rest_of(file)
    return ChunkSource(_reads(file), size, _closing(file))


def _rest_of(file: Any) -> int:
    try:
        offset: int = file.tell()
        file.seek(0, os.SEEK_END)  # which need not return where that is
        end: int = file.tell()
        file.seek(offset)
        return max(0, end - offset)
    except Exception as error:  # it may be a class of the application's
        raise UsageError("size: is needed for a file that cannot seek") from error


def _reads(file: BinaryIO) -> Iterator[object]:
    while True:
        chunk = file.read(CHUNK_BYTES)
        if chunk is None:  # a raw file's way to say so; its type does not tell
            raise BlockingIOError("nothing to read now, and it is set not to block")
        if chunk == b"":
            return
        yield chunk


def _closing(*things: object) -> Callable[[], object]:
    """Return what closes those that can be closed."""

    def close() -> None:
        for thing in things:
            closing = getattr(thing, "close", None)
            if closing is not None and (result := closing()) is not None:
                require_no_awaitable("source.close", result)

    return close
