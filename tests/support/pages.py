"""The programs of the how-to pages: ``python -m tests.support.pages FOLDER`` writes them as files.

A block of Python in ``docs/howto`` is a whole program. A block of text behind it is what it prints.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HOWTO = Path(__file__).parents[2] / "docs" / "howto"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def programs() -> dict[str, tuple[str, str]]:
    """Return each program, and what its page says that it prints, by page and number: tls-1."""
    found = {}
    for page in sorted(HOWTO.glob("*.md")):
        blocks = _BLOCK.findall(page.read_text())
        number = 0
        for n, (language, text) in enumerate(blocks):
            if language == "python":
                number += 1
                behind = blocks[n + 1 : n + 2]
                printed = behind[0][1] if behind and behind[0][0] == "text" else ""
                found[f"{page.stem}-{number}"] = text, printed
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.py"):
        old.unlink()
    for name, (text, _) in programs().items():
        (folder / f"{name.replace('-', '_')}.py").write_text(text)


if __name__ == "__main__":
    main()
