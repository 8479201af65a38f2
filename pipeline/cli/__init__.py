"""The ``raft-pipeline`` command: one file per subcommand. The library never imports this."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command line. Click and rich come with the ``cli`` extra; say so without them."""
    try:
        from pipeline.cli.commands import commands
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("click", "rich"):
            raise
        raise SystemExit(
            f"raft-pipeline needs {missing}: pip install 'raft-pipeline[cli]'"
        ) from None

    commands()
