"""``raft-pipeline probe``: what is wrong with a peer, in one line.

It asks what a node asks, with the library's own dialling and TLS: whether the peer answers probes,
which version it is, and whether it would give us a stream. The last is asked for a member that
nobody is (``X-Raft-To: 0``), so that the peer checks version, cluster and membership, and gives
none: a stream that a node has with it stays.
"""

from __future__ import annotations

import json
import re
import ssl
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from pipeline import Message, MessageType, TLSInfo, TransportConfig, UsageError, parse_id
from pipeline.cli.exchange import Exchange, ExchangeError
from pipeline.cli.options import (
    json_option,
    member_id,
    peer_url,
    show_id,
    tls_of,
    tls_options,
)
from pipeline.identity import Identity
from pipeline.reasons import EXIT_OK, Explanation, explanation_of
from pipeline.wire.odd_answer import PeerAnswer
from pipeline.wire.protocol import (
    CLUSTER_ID,
    SERVER_VERSION,
    VERSION_PATH,
    probe_head,
    reason_phrase,
    request_head,
    stream_head,
)

__all__ = ["Probed", "probe", "probe_peer"]

#: Nobody's: the stream is asked of this member.
NOBODY = 0
OK = Explanation("ok", EXIT_OK, "the peer answers, and nothing is wrong with it", "")
#: What a node claims that sets nothing.
SERVER = TransportConfig().server_version
#: A certificate that expires sooner is told.
EXPIRES_SOON_DAYS = 7.0
#: What is wrong is said by the certificate itself, if it is signed by whom we trust.
_OF_THE_CERTIFICATE = ("expired", "not-yet-valid", "wrong-name")


@dataclass(kw_only=True)
class Probed:
    """What was found out about a peer."""

    url: str
    #: What is wrong, one word; "ok" if nothing is.
    verdict: str = "ok"
    exit_code: int = EXIT_OK
    #: The reason as a node would log it.
    reason: str = ""
    meaning: str = ""
    advice: str = ""
    is_reachable: bool = False
    #: Of ``GET /version``: what it is, and what its cluster is at.
    version: str | None = None
    cluster_version: str | None = None
    #: Hexadecimal.
    cluster_id: str | None = None
    #: The version of TLS, and who the peer is by its certificate.
    tls: str | None = None
    certificate: dict[str, Any] | None = None
    #: Days until the peer's certificate expires, and until ours does.
    expires_in_days: float | None = None
    ours_expires_in_days: float | None = None
    #: Milliseconds.
    dial_ms: float | None = None
    handshake_ms: float | None = None
    round_trips: int = 0
    rtt_p50_ms: float | None = None
    rtt_p99_ms: float | None = None
    notes: list[str] = field(default_factory=list)

    def judge(self, explanation: Explanation, reason: str = "") -> None:
        """Take what is wrong, and why."""
        self.verdict, self.exit_code, self.meaning, self.advice = explanation
        self.reason = reason

    def show(self, certificate: Mapping[str, Any]) -> None:
        """Take the peer's certificate, as ``getpeercert`` has it."""
        if certificate:
            self.certificate = _describe(certificate)
        if "notAfter" in certificate:
            self.expires_in_days = _days_until(ssl.cert_time_to_seconds(certificate["notAfter"]))

    @property
    def line(self) -> str:
        """The verdict in one line."""
        about = f" ({self.reason})" if self.reason else ""
        return f"{self.url}: {self.verdict}: {self.meaning}{about}"


class _SickError(Exception):
    """There is a reason not to go on; the text."""


def probe_peer(
    url: str,
    *,
    tls: TLSInfo | None = None,
    member_id: int | None = None,
    cluster_id: int | None = None,
    server_version: str = SERVER,
    count: int = 10,
    timeout_s: float = 2.0,
) -> Probed:
    """Ask a peer, and judge it. Blocks for as long as the peer takes, within the timeouts.

    Raises
    ------
    UsageError
        If the version, or a file of ``tls``, is no good.
    """
    found = Probed(url=url)
    found.judge(OK)
    identity = Identity(member_id or NOBODY, cluster_id or 0, (), server_version)
    with Exchange(url, tls=tls, timeout_s=timeout_s) as exchange:
        if exchange.credentials is not None:
            found.ours_expires_in_days = _days_until(exchange.credentials.not_after)
        try:
            _connect(exchange, found)
            _ask_probing(exchange, found)
            _ask_version(exchange, found)
            _ask_membership(exchange, found, identity, is_cluster_given=cluster_id is not None)
            _time_round_trips(exchange, found, count)
        except (ExchangeError, _SickError) as error:
            reason = str(error)
            if reason.startswith("TLS"):  # which comes after the connect
                found.is_reachable = True
            if url.startswith("http://") and _may_be_tls(reason) and exchange.speaks_tls():
                reason = f"the peer speaks TLS: {reason}"
            found.judge(explanation_of(reason), reason)
            if found.verdict in _OF_THE_CERTIFICATE:
                found.show(exchange.refused_certificate() or {})
    if found.ours_expires_in_days is not None and found.ours_expires_in_days < 0:
        found.notes.append("our own certificate has expired")
    for whose, days in (
        ("the peer's", found.expires_in_days),
        ("our", found.ours_expires_in_days),
    ):
        if days is not None and 0 <= days < EXPIRES_SOON_DAYS:
            found.notes.append(f"{whose} certificate expires in {days:.1f} days")
    return found


def _connect(exchange: Exchange, found: Probed) -> None:
    dial = exchange.dial()
    found.is_reachable = True
    found.dial_ms = _ms(dial.took_s)
    assert exchange.sock is not None
    session = exchange.sock.tls
    if session is None:
        return
    found.handshake_ms = _ms(dial.tls_s or 0.0)
    found.tls = session.version
    found.show(session.certificate or {})


def _ask_probing(exchange: Exchange, found: Probed) -> None:
    answer = exchange.ask(probe_head(found.url))
    if not _is_probed(answer):
        _look_for_a_client_port(exchange, found)
        raise _SickError(_not_a_peer(answer))


def _look_for_a_client_port(exchange: Exchange, found: Probed) -> None:
    with suppress(ExchangeError):
        _ask_version(exchange, found)
        if found.version is not None:
            found.notes.append("it answers /version: perhaps the member's port for clients")


def _not_a_peer(answer: PeerAnswer) -> str:
    return (
        f"is no peer port: GET /raft/probing is answered "
        f"{answer.status} {reason_phrase(answer.status)}".rstrip()
    )


def _may_be_tls(reason: str) -> bool:
    """Tell whether a plain request failed as it does where TLS is spoken."""
    return bool(re.search("answered 400|malformed|before an answer|reset", reason))


def _is_probed(answer: PeerAnswer) -> bool:
    try:
        said = json.loads(answer.body)
    except (ValueError, RecursionError):
        return False
    return answer.status == 200 and isinstance(said, dict) and said.get("OK") is True


def _ask_version(exchange: Exchange, found: Probed) -> None:
    answer = exchange.ask(probe_head(found.url, VERSION_PATH))
    try:
        said = json.loads(answer.body) if answer.status == 200 else None
    except (ValueError, RecursionError):
        said = None
    if isinstance(said, dict):
        found.version = _text(said.get("etcdserver"))
        found.cluster_version = _text(said.get("etcdcluster"))


def _ask_membership(
    exchange: Exchange, found: Probed, identity: Identity, *, is_cluster_given: bool
) -> None:
    """Ask for a stream that the peer cannot give, and have it say what is wrong before that."""
    answer = _ask_stream(exchange, found, identity)
    if answer.status == 412 and b"cluster ID mismatch" in answer.body and not is_cluster_given:
        # It says which one it is of; asked again as one of that, it says the rest.
        with suppress(UsageError):
            learned = parse_id(found.cluster_id or "")
            identity = Identity(
                identity.member_id,
                learned,
                (),
                identity.server_version,
            )
            answer = _ask_stream(exchange, found, identity)
    text = answer.body.decode("latin-1").strip()
    if answer.status == 404 and SERVER_VERSION.lower() not in answer.headers:
        found.notes.append("it takes no streams")
        _ask_by_post(exchange, found, identity)
    elif answer.status == 410:
        raise _SickError("the member has been permanently removed from the cluster")
    elif answer.status == 404 and identity.member_id != NOBODY:
        raise _SickError(text)
    elif answer.status == 412 and text != "to field mismatch":
        _raise_mismatch(found, text, identity)
    elif answer.status not in (404, 412):
        raise _SickError(f"unhandled http status {answer.status} of a stream")


def _ask_stream(exchange: Exchange, found: Probed, identity: Identity) -> PeerAnswer:
    answer = exchange.ask(stream_head(identity, found.url, "message", NOBODY), telling=412)
    found.cluster_id = answer.headers.get(CLUSTER_ID.lower(), found.cluster_id)
    found.version = found.version or answer.headers.get(SERVER_VERSION.lower())
    return answer


def _ask_by_post(exchange: Exchange, found: Probed, identity: Identity) -> None:
    """Post a message that no node does anything with: MsgHup is a process' own."""
    body = Message(type=MessageType.HUP, from_=identity.member_id).marshal()
    head = request_head(identity, found.url)
    answer = exchange.ask(head + b"%d\r\n\r\n" % len(body) + body, telling=412)
    found.cluster_id = answer.headers.get(CLUSTER_ID.lower(), found.cluster_id)
    text = answer.body.decode("latin-1").strip()
    if answer.status == 403:
        raise _SickError("the member has been permanently removed from the cluster")
    if answer.status == 412:
        is_only_unknown = text == "cluster ID mismatch" and identity.cluster_id == 0
        if not is_only_unknown:
            _raise_mismatch(found, text, identity)
    elif answer.status != 204:
        phrase = reason_phrase(answer.status)
        raise _SickError(f"unexpected http status {answer.status} {phrase} while posting")


def _raise_mismatch(found: Probed, text: str, identity: Identity) -> None:
    if text == "cluster ID mismatch":
        text += f": the peer is of {found.cluster_id}, not of {show_id(identity.cluster_id)}"
    elif text == "incompatible version":
        text += f": the peer has {found.version}, and {identity.server_version} was claimed"
    raise _SickError(text)


def _time_round_trips(exchange: Exchange, found: Probed, count: int) -> None:
    took: list[float] = []
    request = probe_head(found.url)
    for _ in range(count):
        seconds, answer = exchange.time(request)
        took.append(seconds)
        if not _is_probed(answer):
            raise _SickError(_not_a_peer(answer))
    found.round_trips = len(took)
    if took:
        took.sort()
        found.rtt_p50_ms = _ms(took[len(took) // 2])
        found.rtt_p99_ms = _ms(took[min(len(took) - 1, int(len(took) * 0.99))])


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _days_until(when: float) -> float:
    return round((when - time.time()) / 86400, 2)


def _until(found: Probed) -> str:
    assert found.certificate is not None
    until, days = found.certificate["not_after"], found.expires_in_days or 0.0
    return f"{until} (in {days} days)" if days >= 0 else f"{until} ({-days} days ago)"


def _describe(certificate: Mapping[str, Any]) -> dict[str, Any]:
    def name(parts: Any) -> str:
        return ", ".join(f"{kind}={value}" for part in parts for kind, value in part)

    return {
        "subject": name(certificate.get("subject", ())),
        "issuer": name(certificate.get("issuer", ())),
        "names": [f"{kind}:{value}" for kind, value in certificate.get("subjectAltName", ())],
        "not_before": certificate.get("notBefore"),
        "not_after": certificate.get("notAfter"),
    }


@click.command()
@click.argument("url", type=peer_url, metavar="URL")
@click.option(
    "--cluster-id", type=member_id, metavar="HEX", help="The cluster that it should be of."
)
@click.option(
    "--as-member",
    type=member_id,
    metavar="HEX",
    help="Ask as this member: is it known, was it removed?",
)
@click.option(
    "--server-version",
    default=SERVER,
    show_default=True,
    help="The version that we claim.",
)
@click.option("--count", type=click.IntRange(1, 10_000), default=10, show_default=True)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.01, 3600),
    default=2.0,
    show_default=True,
    help="Seconds to connect, to shake hands, and for each answer.",
)
@tls_options
@json_option
def probe(
    *,
    url: str,
    cluster_id: int | None,
    as_member: int | None,
    server_version: str,
    count: int,
    timeout_s: float,
    cert: Path | None,
    key: Path | None,
    cacert: Path | None,
    server_name: str | None,
    as_json: bool,
) -> None:
    """Say in one line what is wrong with the peer at URL, and what to do.

    URL is the peer's, such as https://10.0.0.2:2380. The exit code is 0 if nothing is wrong, 2 for
    a wrong command line, 3 if it cannot be reached, 4 for TLS and certificates, 5 if something
    else listens there, 6 if cluster, version or member do not fit, 7 if the member was removed, 8
    for a fault of this machine, 1 for anything else.
    """
    tls = tls_of(url, cert=cert, key=key, cacert=cacert, server_name=server_name)
    try:
        found = probe_peer(
            url,
            tls=tls,
            member_id=as_member,
            cluster_id=cluster_id,
            server_version=server_version,
            count=count,
            timeout_s=timeout_s,
        )
    except UsageError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        click.echo(json.dumps({**asdict(found), "line": found.line}, indent=2))
    else:
        _print(found)
    raise SystemExit(found.exit_code)


def _print(found: Probed) -> None:
    table = Table(show_header=False, box=None)
    rows: list[tuple[str, object]] = [
        ("reachable", "yes" if found.is_reachable else "no"),
        ("version", found.version),
        ("cluster version", found.cluster_version),
        ("cluster ID", found.cluster_id),
        ("TLS", found.tls),
    ]
    if found.certificate is not None:
        rows += [
            ("certificate of", found.certificate["subject"]),
            ("issued by", found.certificate["issuer"]),
            ("valid for", ", ".join(found.certificate["names"])),
            ("valid from", found.certificate["not_before"]),
            ("valid until", _until(found)),
        ]
    if found.dial_ms is not None:
        shake = "" if found.handshake_ms is None else f", {found.handshake_ms} ms to shake hands"
        rows.append(("connecting", f"{found.dial_ms} ms{shake}"))
    if found.round_trips:
        of = f"of {found.round_trips}"
        rows.append(("round trip", f"p50 {found.rtt_p50_ms} ms, p99 {found.rtt_p99_ms} ms {of}"))
    rows += [("note", note) for note in found.notes]
    for name, value in rows:
        if value is not None:
            table.add_row(name, str(value))
    Console(soft_wrap=True).print(table)
    if found.advice:
        click.echo(f"what to do: {found.advice}")
    click.echo(found.line)
