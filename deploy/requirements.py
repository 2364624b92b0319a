"""Prints what given extras of pyproject.toml install, one requirement a line: `python requirements.py gateway billing`.

It runs while an image is built, before anything is installed, and knows the standard library only.
"""

import argparse
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# The base install is for people: these belong to the command line and its demo, and no service imports them.
CLIENT_ONLY = frozenset({"typer", "rich", "openai"})

_OWN_EXTRAS = re.compile(r"finemesh\[([a-z, ]+)\]")
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("extras", nargs="+", help="extras of the project")
    parser.add_argument("--without", action="append", default=[], help="a package that comes from elsewhere")
    parser.add_argument("--project", type=Path, default=Path("pyproject.toml"))
    options = parser.parse_args(arguments)
    project = tomllib.loads(options.project.read_text(encoding="utf-8"))["project"]
    sys.stdout.writelines(f"{line}\n" for line in requirements(project, options.extras, set(options.without)))
    return 0


def requirements(project: Mapping[str, Any], extras: Sequence[str], without: set[str]) -> list[str]:
    """The project's own requirements and those of the extras, sorted, each once."""
    wanted = set(project["dependencies"])
    for extra in extras:
        wanted.update(_of_extra(project["optional-dependencies"], extra))
    return sorted(requirement for requirement in wanted if name_of(requirement) not in CLIENT_ONLY | without)


def name_of(requirement: str) -> str:
    """`grpcio>=1.85` -> `grpcio`."""
    found = _NAME.match(requirement)
    if found is None:
        raise ValueError(f"{requirement!r} is no requirement")
    return found[0].lower()


def _of_extra(table: Mapping[str, Sequence[str]], extra: str) -> Iterator[str]:
    for requirement in table[extra]:
        own = _OWN_EXTRAS.fullmatch(requirement)
        if own is None:
            yield requirement
            continue
        for name in own[1].split(","):
            yield from _of_extra(table, name.strip())


if __name__ == "__main__":
    sys.exit(main())
