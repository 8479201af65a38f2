"""Programs that must type-check under ``mypy --strict``; ``make typecheck`` sees to it.

A line that must not type-check carries a ``type: ignore`` with its code: mypy complains when there
is nothing to ignore. Nothing here is run.
"""
