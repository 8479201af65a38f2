"""The databases of received snapshots, each stored whole or not at all.

Source: etcd ``snap/db.go`` (``SaveDBFrom``, ``DBFilePath``), spec section 7.5.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import time
from pathlib import Path

from pipeline.config import AnyPath, ReceiverConfig
from pipeline.locks import lock_of
from pipeline.logs import get_logger
from pipeline.stats import SNAPSHOT_BOUNDS_S, Histogram

__all__ = ["Saving", "SnapshotStore"]

logger = get_logger(__name__)

# Ours alone: a node may keep other files in the directory.
_TEMPORARY = re.compile(r"tmp-pipeline-[0-9a-f]{16}-[0-9a-f]{16}")
_DATABASE = re.compile(r"[0-9a-f]{16}\.snap\.db")

# etcd snap/metrics.go.
_FSYNC_BOUNDS_S = tuple(0.001 * 2**i for i in range(14))

# What a file system says that cannot sync, of a directory above all. Not EIO and ENOSPC: those mean
# that it can, and that it went wrong.
_NO_FSYNC = frozenset((errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY))
_NO_FSYNC_OF_A_DIRECTORY = _NO_FSYNC | {errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR}
_NO_STATVFS = frozenset((errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EACCES))


class SnapshotStore:
    """A directory of databases, ``%016x.snap.db`` by the index of their snapshot.

    Parameters
    ----------
    directory : path
    config : ReceiverConfig
        For ``snapshot_max_bytes`` and ``snapshot_dir_max_bytes``.

    Notes
    -----
    Thread-safe. Files are made for their owner only. A file that is there is never overwritten or
    removed: moving it away when it is applied, or removing it, is for the node to do.
    """

    def __init__(self, directory: AnyPath, config: ReceiverConfig) -> None:
        self.directory = Path(os.fsdecode(directory))
        self._config = config
        self._lock = lock_of(self)  # guards names becoming final, and what follows
        self._not_durable: set[str] = set()
        self._saves = Histogram(SNAPSHOT_BOUNDS_S)
        self._fsyncs = Histogram(_FSYNC_BOUNDS_S)

    def prepare(self) -> None:
        """Make the directory, and remove what a process that crashed has left. ``OSError``."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.scandir(self.directory) as entries:
            leftovers = [entry.path for entry in entries if _TEMPORARY.fullmatch(entry.name)]
        for path in leftovers:
            _remove_unlocked(path)

    def path(self, index: int) -> Path:
        """Return where the database of a snapshot is, or would be."""
        return self.directory / f"{index:016x}.snap.db"

    def begin(self, index: int, announced: int | None) -> Saving:
        """Begin to store a database.

        Parameters
        ----------
        index : int
            Of the snapshot.
        announced : int or None
            Its size in bytes, where it is known; nothing is reserved for it.

        Raises
        ------
        OSError
            When it cannot fit, or the file cannot be made.
        """
        if announced is not None:
            self.check_room(announced, announced)
            free = self._free_bytes()
            if free is not None and announced > free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return Saving(self, index)

    def check_room(self, size: int, more: int) -> None:
        """Raise ``OSError`` (EDQUOT) if a file of ``size`` bytes, ``more`` of them new, is not
        to be stored."""
        file_limit, limit = self._config.snapshot_max_bytes, self._config.snapshot_dir_max_bytes
        if file_limit is not None and size > file_limit:
            raise OSError(errno.EDQUOT, "larger than snapshot_max_bytes")
        if limit is not None and self._used() + more > limit:
            raise OSError(errno.EDQUOT, "no room within snapshot_dir_max_bytes")

    def histograms(self) -> tuple[Histogram, Histogram]:
        """Return how long whole saves took, and their fsync."""
        with self._lock:
            return self._saves.copy(), self._fsyncs.copy()

    def make_file_durable(self, fd: int) -> None:
        """Have a file on the disk; ``OSError`` if that fails.

        Where the file system cannot do it, that is told in the log once and gone on without: there
        is no better place to be had.
        """
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in _NO_FSYNC:
                raise
            self._note_not_durable("file", error)

    def make_directory_durable(self) -> None:
        """Have the names of the files on the disk; as :meth:`make_file_durable`.

        CIFS and some of FUSE cannot do this, and a directory need not be readable.
        """
        try:
            fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno not in _NO_FSYNC_OF_A_DIRECTORY:
                raise
            self._note_not_durable("directory", error)

    def _note_not_durable(self, what: str, error: OSError) -> None:
        with self._lock:
            is_first = what not in self._not_durable
            self._not_durable.add(what)
        if is_first:
            logger.warning(
                "a %s in %s cannot be made durable here (%s): a snapshot that was received may be "
                "gone after a crash of the machine",
                what,
                self.directory,
                error.strerror,
                reason=f"{error.strerror}",
            )

    def _free_bytes(self) -> int | None:
        """Return what the file system has free; None if it does not say."""
        try:
            found = os.statvfs(self.directory)
        except OSError as error:
            if error.errno in _NO_STATVFS:
                return None
            raise
        if found.f_blocks == 0:  # 0 of 0, as some of FUSE have it
            return None
        return found.f_bavail * (found.f_frsize or found.f_bsize)

    def _used(self) -> int:
        """Count the bytes of all databases, those that are arriving included."""
        used = 0
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if _DATABASE.fullmatch(entry.name) or _TEMPORARY.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        used += entry.stat(follow_symlinks=False).st_size
        return used

    def _observe(self, histogram: Histogram, begin: float) -> None:
        with self._lock:
            histogram.observe(time.monotonic() - begin)


class Saving:
    """A database on its way to the disk, under a temporary name until ``commit``.

    Used by one thread, but for ``discard``. ``close`` is to be called on every way out.

    Attributes
    ----------
    size : int
        Bytes written.
    """

    def __init__(self, store: SnapshotStore, index: int) -> None:
        self.size = 0
        self._store = store
        self._path = store.path(index)
        self._begin = time.monotonic()
        self._is_temporary = True  # has its temporary name; guarded by the store's lock
        while True:
            name = f"tmp-pipeline-{index:016x}-{secrets.token_hex(8)}"
            self._temporary = store.directory / name
            self._fd = os.open(  # owned; -1 when closed
                self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
            )
            # Tells prepare(), in whatever process, that the file is no leftover; unless that came
            # first, has the lock, and removes the file.
            with contextlib.suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_EX)
            if os.path.lexists(self._temporary):
                break
            os.close(self._fd)

    def write(self, data: memoryview) -> None:
        """Add bytes. ``OSError`` when the disk is full or a limit is reached."""
        self._store.check_room(self.size + len(data), len(data))
        while len(data) > 0:
            written = os.write(self._fd, data)
            self.size += written
            data = data[written:]

    def commit(self) -> None:
        """Make the file durable, as far as can be, and give it its name; ``OSError`` if that fails.

        If there is one of that name it stays, and this is a success, as in etcd.
        Differs from etcd: the directory is made durable as well.
        """
        store = self._store
        begin = time.monotonic()
        store.make_file_durable(self._fd)
        store._observe(store._fsyncs, begin)
        with store._lock:
            if not self._is_temporary:  # discarded meanwhile
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
            is_new = not self._path.exists()
            if is_new:
                os.rename(self._temporary, self._path)
                self._is_temporary = False
        store.make_directory_durable()
        if is_new:
            store._observe(store._saves, self._begin)

    def discard(self) -> None:
        """Remove the temporary file, if it is still one; from any thread, at any time."""
        with self._store._lock:
            is_temporary, self._is_temporary = self._is_temporary, False
        if is_temporary:
            try:
                os.unlink(self._temporary)
            except FileNotFoundError:
                pass
            except OSError as error:  # why it is discarded is told, and not hidden by this
                text, reason = "cannot remove %s: %s", f"{error.strerror}"
                logger.warning(text, self._temporary, reason, reason=reason)

    def close(self) -> None:
        """Discard what was not committed, and let go of the file."""
        self.discard()
        self._close()

    def forget_after_fork(self) -> None:
        """In a forked child: leave the file, which is the parent's, and let go of its lock."""
        self._is_temporary = False
        self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _remove_unlocked(path: str) -> None:
    """Remove a temporary file unless somebody is writing it."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        finally:
            os.close(fd)
