"""CONTRIBUTING.md names files that are there and counts them right; what it promises to keep small is small."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CHANGES = re.findall(
    r"^### (\d+)\. ([^\n]+): (\d+) files\n(.*?)(?=^##)",
    PAGE.split("## Where to change what")[1],
    re.MULTILINE | re.DOTALL,
)
TOPS = "formats|chassis|services|client|deploy|bench|protos|scripts|docs|tests"
PATH = re.compile(rf"(?<![\w/.])(?:{TOPS})/[\w./-]*\w/?")
FILE = re.compile(r"^- (new in )?`([^`]+)`: \S", re.MULTILINE)
FILES_MAX = {"A loss for preference pairs": 10, "A dataset format": 6, "A job's priority": 8}


def test_twelve_changes_are_told() -> None:
    assert [int(number) for number, *_ in CHANGES] == [*range(1, 13)]


@pytest.mark.parametrize(("title", "count", "body"), [change[1:] for change in CHANGES], ids=[c[1] for c in CHANGES])
def test_a_change_names_as_many_files_as_it_says(title: str, count: str, body: str) -> None:
    lines = [line for line in body.splitlines() if line.startswith("- ")]
    files = [path for _, path in FILE.findall(body)]
    assert len(files) == len(lines) == len(set(files)) == int(count)
    assert int(count) <= FILES_MAX.get(title, len(files))
    for new, path in FILE.findall(body):
        assert (ROOT / path).is_dir() if new else (ROOT / path).is_file(), path


def test_the_changes_that_stay_small_are_among_them() -> None:
    assert FILES_MAX.keys() <= {title for _, title, *_ in CHANGES}


def test_every_path_on_the_page_is_there() -> None:
    paths = set(PATH.findall(PAGE))
    assert len(paths) > 60
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


def test_the_example_commands_name_tests_that_are_there() -> None:
    named = re.findall(r"pytest -q (tests/\S+?\.py) -k (\w+)", PAGE)
    assert named
    assert [
        (path, word) for path, word in named if not re.search(rf"def test_\w*{word}", (ROOT / path).read_text())
    ] == []
