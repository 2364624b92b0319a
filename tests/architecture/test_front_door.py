"""The pages for people keep their word: what they name is there, and what is there is named."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted(page for folder in (ROOT, ROOT / "docs", ROOT / "docs/adr") for page in folder.glob("*.md"))
CITED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#]+)(?:#[^)]*)?\)")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    broken = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_cited_tests_exist(page: Path) -> None:
    missing = []
    for path, test in CITED.findall(page.read_text()):
        source = ROOT / path
        if not source.exists() or (test and not re.search(rf"def {test}\(", source.read_text())):
            missing.append(f"{path}::{test}")
    assert missing == []


def test_every_promise_of_security_names_a_test() -> None:
    promised = (ROOT / "SECURITY.md").read_text().split("## What is promised")[1].split("## Known gaps")[0]
    rows = [line for line in promised.splitlines() if line.startswith("| ")][1:]
    assert rows
    assert [row for row in rows if not any(test for _, test in CITED.findall(row))] == []


def test_the_map_of_the_pages_has_them_all() -> None:
    linked = set(LINK.findall((ROOT / "docs/README.md").read_text()))
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert pages - linked == {"README.md"}


def test_the_hooks_run_what_make_check_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    (needs,) = re.findall(r"^check: \$\(VENV\)/\.ready (.*?) ##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [hook["entry"] for hook in hooks] == [f"make {target}" for target in needs.split()]
    assert all(hook["language"] == "system" for hook in hooks)
