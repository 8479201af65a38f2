"""Arguments and options that several subcommands take, and how they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from pipeline import TLSInfo, UsageError, format_id, parse_id
from pipeline.wire.urls import parse_peer_urls

__all__ = ["json_option", "member_id", "peer_url", "show_id", "tls_of", "tls_options"]

Command = TypeVar("Command", bound=Callable[..., Any])


def member_id(text: str | int) -> int:
    """Read a member's or a cluster's ID, as etcd and this library's log write it."""
    try:
        return text if isinstance(text, int) else parse_id(text)
    except UsageError as error:
        raise click.BadParameter(str(error)) from error


def peer_url(text: str) -> str:
    """Read a peer URL, such as ``https://10.0.0.2:2380``."""
    try:
        (url,) = parse_peer_urls((text,), "url")
    except UsageError as error:
        raise click.BadParameter(str(error)) from error
    if not url.startswith(("http://", "https://")):
        raise click.BadParameter("only http and https can be dialled")
    return url


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def tls_options(command: Command) -> Command:
    """Give a command the options that :func:`tls_of` reads; their names are etcdctl's."""
    for option in (
        click.option("--server-name", help="The name the peer must prove, not the URL's host."),
        click.option("--cacert", type=_FILE, help="Who signs the peers' certificates, PEM."),
        click.option(
            "--key", type=_FILE, help="The key of our certificate, PEM; by default in it."
        ),
        click.option("--cert", type=_FILE, help="The certificate that we show, PEM, for https."),
    ):
        command = option(command)
    return command


def tls_of(
    url: str,
    *,
    cert: Path | None,
    key: Path | None,
    cacert: Path | None,
    server_name: str | None,
) -> TLSInfo | None:
    """Return what the TLS options say of a URL; a usage error if it is https and they are missing.

    None for an http URL, whatever they say.
    """
    if not url.startswith("https://"):
        return None
    if cert is None:
        raise click.UsageError("https needs --cert (with --key and --cacert), as a peer's")
    try:
        return TLSInfo(
            cert_file=cert,
            key_file=key or cert,
            trusted_ca_file=cacert,
            client_cert_auth=cacert is not None,
            server_name=server_name,
        )
    except UsageError as error:
        raise click.UsageError(str(error)) from error


def json_option(command: Command) -> Command:
    """Give a command ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")(
        command
    )


def show_id(value: int | None) -> str | None:
    """Write an ID, or nothing."""
    return None if value is None else format_id(value)
