"""Fills deploy/.env from deploy/env.example with random secrets:
`python -m deploy.compose_env` (or `make compose-env`).

A value that is there is never changed, so it is safe to run again after an upgrade that brings new variables.
"""

import argparse
import os
import re
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

EXAMPLE = Path(__file__).with_name("env.example")
TARGET = Path(__file__).with_name(".env")
SECRET_BYTES = 24

_ASSIGNMENT = re.compile(r"^(?P<name>[A-Z][A-Z0-9_]*)=(?P<value>.*)$", re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.compose_env", description=__doc__)
    parser.add_argument("--out", type=Path, default=TARGET, help="the file that compose reads")
    target = parser.parse_args(arguments).out
    present = target.read_text(encoding="utf-8") if target.exists() else ""
    text, made = filled(EXAMPLE.read_text(encoding="utf-8"), present, lambda: secrets.token_hex(SECRET_BYTES))
    if made:
        write_private(target, text)
    print(f"{target}: {len(made)} secrets made" if made else f"{target}: complete")
    return 0


def filled(example: str, present: str, new_secret: Callable[[], str]) -> tuple[str, list[str]]:
    """The complete text, and the names that got a secret: the example's empty ones that `present` does not set."""
    made: list[str] = []

    def fill(match: re.Match[str]) -> str:
        if match["value"]:
            return match[0]
        made.append(match["name"])
        return f"{match['name']}={new_secret()}"

    if not present:
        return _ASSIGNMENT.sub(fill, example), made
    kept = {match["name"] for match in _ASSIGNMENT.finditer(present)}
    text = _ASSIGNMENT.sub(fill, present)
    missing = [match for match in _ASSIGNMENT.finditer(example) if match["name"] not in kept]
    lines = [text.rstrip("\n"), *map(fill, missing)]
    return "\n".join(lines) + "\n", made


def write_private(path: Path, text: str) -> None:
    """Replaces the file at once; only this user can read it."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
