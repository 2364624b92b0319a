"""The list of error reasons is closed: every literal reason in the source is a value of the published enum."""

import ast
from pathlib import Path

import pytest

from chassis import errors
from finemesh.common.v1 import error_reason_pb2

ROOT = Path(__file__).parents[3]
PREFIX = "ERROR_REASON_"
REASONS = {name.removeprefix(PREFIX) for name in error_reason_pb2.ErrorReason.keys()}  # noqa: SIM118 - no mapping
CLASSES = {kind.__name__ for kind in errors.DomainError.__subclasses__()}
SOURCES = sorted(path for folder in ("chassis", "services") for path in (ROOT / folder).rglob("*.py"))


def reasons_in(source: Path) -> list[tuple[int, str]]:
    """Line and reason of each `NotFound("...", ...)`, also of `errors.NotFound(...)`."""
    found = []
    for node in ast.walk(ast.parse(source.read_text())):
        if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", None))
        if name in CLASSES and isinstance(node.args[0].value, str):
            found.append((node.lineno, node.args[0].value))
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_reason_is_published(source: Path) -> None:
    assert [place for place in reasons_in(source) if place[1] not in REASONS] == []


def test_the_search_finds_reasons() -> None:
    assert "CALLER_NOT_ALLOWED" in {reason for _, reason in reasons_in(ROOT / "chassis" / "rpc" / "guard.py")}


def test_the_reasons_of_bare_statuses_are_published() -> None:
    assert {reason for reason, _ in errors._UNTYPED.values()} <= REASONS
