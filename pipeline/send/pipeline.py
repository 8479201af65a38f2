"""The pipeline: msgc and four workers that post one message each to a peer's ``/raft``.

Source: etcd rafthttp/pipeline.go. The workers run in the I/O loop (``_worker.pxd``); here is what
they need Python for, and the side effects of a post in etcd's order (spec section 2.4).
"""

from __future__ import annotations

import atexit
import errno
import http.client
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import ClassVar, Self

from pipeline._core import (
    ActiveFlag,
    Event,
    GiveBack,
    Sender,
    Worker,
    error_text,
)
from pipeline.arguments import require_id, require_instance
from pipeline.callbacks import Callbacks, require_callable, require_raft
from pipeline.config import PipelineConfig, TransportConfig
from pipeline.errors import STOPPED, MemberRemovedError, PeerUnreachableError, PostError, UsageError
from pipeline.forks import disown, nothing_to_stop
from pipeline.identity import MIN_CLUSTER_VERSION, Identity
from pipeline.locks import lock_of
from pipeline.logs import Throttle, get_logger, show
from pipeline.net.dialling import Dial, DialError
from pipeline.net.pool import Pool, PooledConnection
from pipeline.raft import AnyRaft, ProcessingRaft
from pipeline.send.changes import PeerChange, PeerChanges
from pipeline.send.dispatcher import Dispatcher
from pipeline.send.picker import URLPicker
from pipeline.send.reports import Reports
from pipeline.send.status import PeerStatus
from pipeline.threads import Once, require_real_threads
from pipeline.tls.credentials import Credentials
from pipeline.types import MessageType
from pipeline.wire import protocol
from pipeline.wire.odd_answer import TEXT_TIMEOUT_S
from pipeline.wire.urls import parse_peer_urls
from pipeline.wire.versions import Versions

__all__ = ["Pipeline"]

logger = get_logger(__name__)

#: ``Pipeline.stop`` returns within this; etcd's tests ask the same of its pipeline.
STOP_TIMEOUT_S = 1.0
#: The main thread sees signals this often while it waits for the workers to end.
WAIT_STEP_S = 0.1

_handling = threading.local()  # .pipeline: whose event this thread is handling


class PeerPipeline(Sender):
    """Messages to one peer, or remote, of a node over at most ``config.connections`` connections.

    Parameters
    ----------
    peer_id : int
        The member it sends to; 64 bits.
    urls : iterable of str
        The peer's URLs, ``http://host:port`` or ``https://host:port``.
    raft : Raft
        Told of what could not be delivered, from the dispatcher's threads.
    identity : Identity
        Who sends.
    dispatcher : Dispatcher
        Runs the workers and calls Raft.
    config : PipelineConfig
    on_critical_error : callable, optional
        Called with a ``MemberRemovedError`` when the peer answers 403.
    on_peer_change : callable, optional
        Called with a ``PeerChange`` when the peer becomes something else, until
        ``tell_no_change``.
    credentials : Credentials, optional
        For ``https`` URLs. Who gives them calls ``retire_connections`` after each rotation.
    callbacks : Callbacks, optional
        Counts callbacks that raise for the whole transport.
    versions : Versions, optional
        Shown the headers of answers that Python sees.
    picker, status : URLPicker, PeerStatus, optional
        To be shared with other channels to the peer. With a picker ``urls`` are ignored.

    Raises
    ------
    UsageError
        If a URL or an ID is not valid.

    Notes
    -----
    ``send``, ``stats`` and ``follower_stats`` are :class:`pipeline._core.Sender`'s, without a
    Python frame in between. All methods are thread-safe. There is no order among messages in
    flight; with ``connections=1`` only one is.
    """

    # What applications ask of a pipeline, and a forked child is refused. The rest our threads ask.
    _ASKED: ClassVar[tuple[str, ...]] = (
        "start",
        "send",
        "stats",
        "follower_stats",
        "callback_errors",
        "update",
    )

    def __init__(
        self,
        peer_id: int,
        urls: Iterable[str],
        raft: AnyRaft,
        identity: Identity,
        *,
        dispatcher: Dispatcher,
        config: PipelineConfig,
        on_critical_error: Callable[[MemberRemovedError], None] | None = None,
        on_peer_change: Callable[[PeerChange], None] | None = None,
        credentials: Credentials | None = None,
        callbacks: Callbacks | None = None,
        versions: Versions | None = None,
        picker: URLPicker | None = None,
        status: PeerStatus | None = None,
    ) -> None:
        self.peer_id = peer_id
        self.identity = identity
        self.picker = URLPicker(urls) if picker is None else picker
        self.status = status or PeerStatus(identity.member_id, peer_id, ActiveFlag())
        self._log = logger.about(
            local=protocol.format_id(identity.member_id),
            peer=protocol.format_id(peer_id),
            channel="pipeline",
        )
        self._callbacks = Callbacks(self._log, callbacks)
        if on_peer_change is not None:
            self.status.changes = PeerChanges(peer_id, on_peer_change, self._callbacks)
        self._peer = protocol.format_id(peer_id)
        #: Messages, and their bytes, that may wait.
        self.queue_length, self.queue_bytes = config.queue_length, config.queue_bytes
        self._config = config
        #: Tells what became of messages to this peer, whatever carries them.
        self.reports = Reports(
            peer_id,
            raft,
            picker=self.picker,
            status=self.status,
            callbacks=self._callbacks,
            is_every_told=config.unreachable_reports == "every",
            on_critical_error=on_critical_error,
        )
        self._credentials = credentials
        self._versions = versions
        self._dispatcher = dispatcher
        self._pools: dict[str, Pool] = {}
        self._throttle = Throttle(self._log)
        self._lock = lock_of(self)  # guards the pools
        self._beginning = Once()
        self._ending = Once()
        for url in self.picker.urls:
            self.pool(url)  # a URL that cannot be sent to is refused here
        self.picker.subscribe(self.renew)

    @property
    def callback_errors(self) -> int:
        """Calls of Raft and of ``on_critical_error`` that raised; the log has each."""
        return self._callbacks.errors

    def start(self) -> None:
        """Start the workers. A pipeline can be started once.

        Raises
        ------
        UsageError
            If it was started before.
        """
        self._take_beginning()
        self._open()

    def _take_beginning(self) -> None:
        if self._ending.is_taken() or not self._beginning.take():
            raise UsageError("start: a pipeline can be started once")

    def _open(self) -> None:
        connections = [
            PooledConnection(protocol.TELLING_STATUS) for _ in range(self._config.connections)
        ]
        self._dispatcher.open(self, self.status.flag, self._config, connections)
        if self._ending.is_taken():  # meanwhile, perhaps before there were workers to be ended
            self.stop()
        self._log.info("started HTTP pipelining with remote peer %s", self._peer)

    def stop(self) -> int:
        """Refuse further messages, drop what is queued, end what is in flight.

        Messages in flight fail with all the side effects of a failure. Returns within one second,
        whatever state the workers are in. A callback that has not returned by then is reported in
        the log; its worker ends after it. Called from one of our own callbacks, it does not wait
        for that callback. A second call waits for what the first, interrupted or in another
        thread, has not seen to its end.

        Returns
        -------
        int
            How many queued messages this call dropped; 0 when it was stopped before.
        """
        deadline = time.monotonic() + STOP_TIMEOUT_S
        dropped = self.stop_begin()
        self.stop_end(deadline)
        return dropped

    def tell_no_change(self) -> None:
        """Tell nobody any more what becomes of the peer."""
        if self.status.changes is not None:
            self.status.changes.close()

    def stop_begin(self) -> int:
        """The part of :meth:`stop` that does not wait; ``Transport`` stops all peers at once."""
        self._ending.take()
        self.tell_no_change()  # what fails from now on is our doing
        dropped = self.begin_stop()
        for worker in self.workers:
            if (dial := worker.connection.dial) is not None:
                self._dispatcher.dialer.cancel(dial)
        if dropped:
            text = "dropped %d queued messages to peer %s at stop"
            self._log.info(text, dropped, self._peer, reason=STOPPED)
        return dropped

    def stop_end(self, deadline: float) -> None:
        """Wait for the workers until ``deadline`` (``time.monotonic()``) and close connections."""
        mine = 1 if getattr(_handling, "pipeline", None) is self else 0
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            live = self.wait_stopped(min(left_s, WAIT_STEP_S), mine)
            if live <= mine or left_s <= WAIT_STEP_S:
                break
        if live > mine:
            self._log.warning(
                "%d workers for peer %s are still in a callback of Raft; they end after it",
                live - mine,
                self._peer,
                reason="a callback blocks",
            )
        for worker in self.workers:
            if worker.is_retired():
                worker.connection.close()
        if live == 0:
            self._log.info("stopped HTTP pipelining with remote peer %s", self._peer)

    def update(self, urls: Iterable[str]) -> None:
        """Send to other URLs from the next message on; ``UsageError`` for a bad one."""
        urls = parse_peer_urls(urls)
        for url in urls:
            self.pool(url)
        self.picker.update(urls)
        with self._lock:
            for old in self._pools.keys() - set(urls):
                self._pools.pop(old, None)

    def forget_after_fork(self) -> None:
        """Cut loose in a forked child: what the parent runs is not for it to use."""
        disown(self, "pipeline", self._ASKED, stop=nothing_to_stop)

    # What follows runs in dispatcher threads, for one worker at a time each, but for connections:
    # those are dialled and closed in the poller's thread, which calls nothing of the application's.

    def on_event(self, worker: Worker, event: Event, error: int) -> None:
        """Do what the loop needs Python for, then give the worker back. Never raises."""
        _handling.pipeline = self
        try:
            self._handle(worker, event, error)
        except BaseException as failure:
            # Ours to fix, not the worker's to die of: its message fails like any other.
            self._log.exception("internal error, please report: event %s", event.name)
            if worker.has_job():
                self._fail(worker, self._unreachable(worker, f"internal error: {show(failure)}"))
            else:
                self._disconnect(worker)
                self._give_back(worker)
        finally:
            _handling.pipeline = None

    # The life of a worker, as far as it comes here. The loop takes a message, posts it on a
    # connection that is there and recognises the 204 without Python: that is not in the table.
    #
    #   the worker was            | event     | here                        | then
    #   --------------------------+-----------+-----------------------------+-------------------
    #   given a message, without  | CONNECT   | poller: close what is too   | the loop writes, or
    #     a connection for it     |           | old, pick a URL, dial it,   | NOT_DIALLED
    #                             |           | TLS as well, take the socket|
    #   dialling, in vain         | NOT_      |                             | failed
    #                             |   DIALLED |                             |
    #   reading something odd     | ANSWER    | http.client reads it        | sent, failed, or
    #                             |           |                             | the loop reads on
    #   reading a 204 that others | SUCCEEDED |                             | sent
    #     have to hear of         |           |                             |
    #   writing or reading, when  | FAILED    | judge the text so far       | sent, failed
    #     it broke off            |           | there is none               | failed
    #   idle, when the peer       | CLOSED    | poller: close the           | idle
    #     closed the connection   |           | connection                  |
    #
    #   sent    Reports.delivered: status, Raft (a MsgSnap has ended); then the books
    #   failed  Reports.failed: picker, critical error, status, follower, Raft; then the books
    #
    # After both the worker is given back, and the loop takes the next message for it. Given back
    # to a pipeline that has stopped it is retired, and if it has a message that one fails first.

    def _handle(self, worker: Worker, event: Event, error: int) -> None:
        match event:
            case Event.NOT_DIALLED:
                failure = DialError(worker.connection.failure or STOPPED)
                self._fail(worker, self._unreachable(worker, str(failure), failure))
            case Event.ANSWER:
                self._judge(worker, *worker.answer(), is_ended=error != 0)
            case Event.SUCCEEDED:
                self._succeed(worker)
            case Event.FAILED if worker.connection.odd.is_text_due:
                self._judge(worker, *worker.answer(), is_ended=True)
            case Event.FAILED:
                self._fail(worker, self._unreachable(worker, self._reason(worker, error)))

    def on_connect(self, worker: Worker, event: Event) -> None:
        """Begin to dial for a worker, or close its idle connection; in the poller's thread."""
        try:
            self._disconnect(worker)
            if event is Event.CONNECT:
                self._dial(worker)
            elif worker.give_back() is GiveBack.RETIRED:
                worker.connection.close()
        except BaseException as failure:
            self._broken_dial(worker, failure)

    def _dial(self, worker: Worker) -> None:
        dial = worker.connection.prepare(
            self.pool(self.picker.pick()),
            self._config.dial_timeout_s,
            partial(self._dialled, worker),
        )
        dialer = self._dispatcher.dialer
        dialer.begin(dial)
        # From here on the worker is the dial's.
        if self._ending.is_taken():
            dialer.cancel(dial)

    def _dialled(self, worker: Worker, dial: Dial) -> None:
        """Go on with a worker whose dial has ended; in the poller's thread."""
        try:
            connection = worker.connection
            connection.failure = dial.failure
            if not dial.failure:
                worker.connect(connection.open(), connection.head)
                if worker.give_back() is GiveBack.TO_LOOP:
                    return
        except BaseException as failure:
            self._broken_dial(worker, failure)
        else:
            worker.not_dialled()  # or the pipeline has been stopped meanwhile

    def _broken_dial(self, worker: Worker, failure: BaseException) -> None:
        self._log.exception("internal error, please report: a dial")
        if worker.has_job():
            worker.connection.failure = f"internal error: {show(failure)}"
            worker.not_dialled()
        else:
            worker.give_back()

    def _judge(self, worker: Worker, data: bytes, is_written: bool, *, is_ended: bool) -> None:
        """Have http.client read the answer, and decide by spec section 2.5."""
        connection = worker.connection
        try:
            answer = connection.odd.feed(data, is_ended=is_ended, is_written=is_written)
        except (http.client.HTTPException, ValueError) as error:
            reason = f"malformed or incomplete answer: {error!r}"
            self._fail(worker, self._unreachable(worker, reason, error))
            return
        if answer is None:
            worker.read_on(TEXT_TIMEOUT_S if connection.odd.is_text_due else 0.0)
            self._give_back(worker)
            return
        if answer.keep:
            worker.keep()
        else:
            self._disconnect(worker)
        self.note_version(answer.headers)
        url = protocol.post_url(connection.url)
        failure = protocol.check_answer(
            answer.status, answer.body, answer.headers, peer_id=self.peer_id, url=url
        )
        if failure is None:
            self._succeed(worker)
        else:
            self._fail(worker, failure, keep=answer.keep)

    def _succeed(self, worker: Worker) -> None:
        kind, to, _ = worker.job()
        self.reports.delivered(kind, to)
        worker.finish(True)
        self._give_back(worker)

    def _fail(self, worker: Worker, error: PostError, *, keep: bool = False) -> None:
        """Tell everyone who has to know, and count."""
        kind, to, _ = worker.job()
        if not keep:
            self._disconnect(worker)
        self.reports.failed(kind, to, error, worker.connection.url, worker.count_failed_append)
        worker.finish(False)
        self._give_back(worker)

    def _give_back(self, worker: Worker) -> None:
        given = worker.give_back()
        if given is GiveBack.RETIRED:
            worker.connection.close()
        elif given is GiveBack.HAS_JOB:
            self._fail(worker, self._unreachable(worker, STOPPED))

    def _disconnect(self, worker: Worker) -> None:
        worker.disconnect()
        worker.connection.odd.clear()
        worker.connection.close()

    def _reason(self, worker: Worker, error: int) -> str:
        if error == errno.EPROTO and (tls := worker.connection.sock.tls) is not None:
            return f"TLS: {tls.reason}"
        return error_text(error)

    def _unreachable(
        self, worker: Worker, reason: str, cause: BaseException | None = None
    ) -> PeerUnreachableError:
        connection = worker.connection
        error = PeerUnreachableError(reason, peer_id=self.peer_id, url=connection.url)
        error.__cause__ = cause
        return error

    def note_version(self, headers: Mapping[str, str]) -> None:
        """See the headers of an answer, with names in lower case."""
        if self._versions is not None:
            self._versions.note(self.peer_id, headers)

    def on_expired(self) -> None:
        """Fail what waited longer than ``max_queue_age``. It says nothing of the peer."""
        expired = self.take_expired()
        if not expired:
            return
        for kind, to in expired:
            self.reports.not_tried(to, snapshots=int(kind == MessageType.SNAP))
        self.finish_expired(len(expired))
        self.status.count("too-old", len(expired))
        self._throttle.warning(
            "dropped %d messages to peer %s that waited longer than %g s",
            len(expired),
            self._peer,
            self._config.max_queue_age,
            reason=f"waited longer than {self._config.max_queue_age:g} s",
        )

    def pool(self, url: str) -> Pool:
        """Return the connections to one of the peer's URLs. Any thread."""
        with self._lock:
            pool = self._pools.get(url)
            if pool is None:
                pool = self._pools[url] = Pool(
                    url,
                    protocol.request_head(self.identity, url),
                    size=self._config.connections,
                    dead_link_timeout_s=self._config.dead_link_timeout_s,
                    credentials=self._credentials,
                )
            return pool


class Pipeline(PeerPipeline):
    """A pipeline to one peer, without a Transport: it has threads of its own.

    Parameters
    ----------
    peer_id : int
        The member it sends to; 64 bits.
    urls : iterable of str
        The peer's URLs, ``http://host:port`` or ``https://host:port``.
    raft : Raft
        Told of what could not be delivered, from the dispatcher's threads.
    member_id, cluster_id : int
        Ours; 64 bits.
    config : PipelineConfig, optional
        The settings; the defaults when left out.
    peer_urls : iterable of str
        Where we are reached; sent as X-PeerURLs.
    server_version, min_cluster_version : str
        Sent as X-Server-Version and X-Min-Cluster-Version.
    on_critical_error : callable, optional
        Called with a ``MemberRemovedError`` when the peer answers 403. Stopping the node is the
        application's decision.
    credentials : Credentials, optional
        For ``https`` URLs. Who gives them calls ``retire_connections`` after each rotation.
    picker, status : URLPicker, PeerStatus, optional
        To be shared with other channels to the peer. With a picker ``urls`` are ignored.

    Raises
    ------
    UsageError
        If a URL or an ID is not valid, ``raft`` lacks a method, or a callback is ``async``.

    Notes
    -----
    All methods are thread-safe. There is no order among messages in flight; with
    ``connections=1`` only one is. A context manager: starts and stops.
    """

    _ASKED: ClassVar[tuple[str, ...]] = (*PeerPipeline._ASKED, "__enter__")

    def __init__(
        self,
        peer_id: int,
        urls: Iterable[str],
        raft: ProcessingRaft,
        *,
        member_id: int,
        cluster_id: int,
        config: PipelineConfig | None = None,
        peer_urls: Iterable[str] = (),
        server_version: str | None = None,
        min_cluster_version: str = MIN_CLUSTER_VERSION,
        on_critical_error: Callable[[MemberRemovedError], None] | None = None,
        credentials: Credentials | None = None,
        picker: URLPicker | None = None,
        status: PeerStatus | None = None,
    ) -> None:
        require_raft(raft)
        require_callable("on_critical_error", on_critical_error)
        require_real_threads()
        require_id("peer_id", peer_id)
        for name, given, kind in (
            ("config", config, PipelineConfig),
            ("credentials", credentials, Credentials),
            ("picker", picker, URLPicker),
            ("status", status, PeerStatus),
        ):
            if given is not None:
                require_instance(name, given, kind)
        defaults = TransportConfig()
        identity = Identity(
            member_id,
            cluster_id,
            parse_peer_urls(peer_urls, "peer_urls", may_be_empty=True),
            defaults.server_version if server_version is None else server_version,
            min_cluster_version,
        )
        dispatcher = Dispatcher(
            protocol.format_id(peer_id),
            queue_bytes=defaults.queue_bytes,
            max_threads=defaults.dispatchers,
        )
        super().__init__(
            peer_id,
            urls,
            raft,
            identity,
            dispatcher=dispatcher,
            config=config or defaults.pipeline,
            on_critical_error=on_critical_error,
            credentials=credentials,
            picker=picker,
            status=status,
        )

    def start(self) -> None:
        """Start the threads and the workers. A pipeline can be started once.

        Raises
        ------
        UsageError
            If it was started before.
        """
        require_real_threads()
        self._take_beginning()
        atexit.register(self.stop)
        self._dispatcher.start()
        self._open()

    def stop_end(self, deadline: float) -> None:
        """Wait for the workers and the threads until ``deadline`` (``time.monotonic()``)."""
        super().stop_end(deadline)
        self._dispatcher.stop(deadline)
        atexit.unregister(self.stop)

    def forget_after_fork(self) -> None:
        """As of :class:`PeerPipeline`."""
        atexit.unregister(self.stop)
        super().forget_after_fork()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
