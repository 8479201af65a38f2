"""``raft-pipeline explain``: what a reason in a log line means."""

from __future__ import annotations

import json
import sys

import click

from pipeline.cli.options import json_option
from pipeline.reasons import EXIT_FAILED, EXIT_OK, explanation_of

__all__ = ["explain"]


@click.command()
@click.argument("reason", nargs=-1)
@json_option
def explain(reason: tuple[str, ...], as_json: bool) -> None:
    """Say what REASON, of a log line or of last_error, means and what to do.

    Without REASON it is read from standard input. The exit code is 1 for one that is not known.
    """
    text = " ".join(reason) or sys.stdin.read().strip()
    if not text:
        raise click.UsageError("there is no reason to explain")
    found = explanation_of(text)
    if as_json:
        click.echo(json.dumps({"reason": text, **found._asdict()}, indent=2))
    else:
        click.echo(f"{found.verdict}: {found.meaning}\n{found.advice}")
    raise SystemExit(EXIT_FAILED if found.verdict == "failed" else EXIT_OK)
