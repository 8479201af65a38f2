"""The group of all subcommands. Each is imported when it is asked for, and brings what it needs."""

from __future__ import annotations

import importlib

import click
import rich  # noqa: F401 - so that it is missed here, and not by one subcommand and not another
from click.shell_completion import get_completion_class

__all__ = ["commands"]

#: Those that have a module of their own, which has their name.
MODULES = ("bench", "decode", "demo", "explain", "probe", "snapshot", "top")


class _Commands(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return sorted((*self.commands, *MODULES))

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in MODULES:
            return super().get_command(context, name)
        command: click.Command = getattr(importlib.import_module(f"pipeline.cli.{name}"), name)
        return command


@click.group("raft-pipeline", cls=_Commands)
@click.version_option(package_name="raft-pipeline")
def commands() -> None:
    """The network half of a Raft node: etcd's rafthttp pipeline for Python."""


@commands.command()
@click.argument("shell", type=click.Choice(["bash", "fish", "zsh"]))
def completion(shell: str) -> None:
    """Print what has SHELL complete this command: eval "$(raft-pipeline completion bash)"."""
    found = get_completion_class(shell)
    assert found is not None
    made = found(commands, {}, "raft-pipeline", "_RAFT_PIPELINE_COMPLETE")
    click.echo(made.source())
