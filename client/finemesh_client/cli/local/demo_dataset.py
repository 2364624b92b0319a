"""The demo's dataset: which of ten standard-library modules does this docstring come from?

It reads source files only.
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Source path in the standard library (file or package) and the module's name as the answer.
MODULES = {
    "asyncio": "asyncio",
    "email": "email",
    "importlib": "importlib",
    "logging": "logging",
    "xml": "xml",
    "multiprocessing": "multiprocessing",
    "unittest": "unittest",
    "http": "http",
    "mailbox.py": "mailbox",
    "_pydecimal.py": "decimal",
}
QUESTION = "Which module does this docstring come from?\n\n{docstring}"
DOCSTRING_CHARS = (30, 240)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question with its answer."""

    question: str
    answer: str

    def as_line(self) -> str:
        """The row as one line of a conversation dataset."""
        messages = [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]
        return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def docstrings(source: Path) -> Iterator[str]:
    """The docstrings of one file or of every file of a package, in source order, tests left out."""
    files = [source] if source.is_file() else sorted(p for p in source.rglob("*.py") if "test" not in p.parts)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                yield text


def excerpt(docstring: str) -> str:
    """The docstring on one line, shortened at a word."""
    text = " ".join(docstring.split())
    return text if len(text) <= DOCSTRING_CHARS[1] else text[: DOCSTRING_CHARS[1]].rsplit(" ", 1)[0]


def make_rows(per_module_max: int = 110, held_out_per_module: int = 12, seed: int = 7) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows), shuffled by the seed; no text is in both, and no held-out answer is rarer than
    another."""
    library, rng = Path(sysconfig.get_paths()["stdlib"]), random.Random(seed)  # noqa: S311
    training: list[Row] = []
    held_out: list[Row] = []
    seen: set[str] = set()
    for source, module in MODULES.items():
        texts: list[str] = []
        for text in map(excerpt, docstrings(library / source)):
            if len(text) >= DOCSTRING_CHARS[0] and text not in seen:
                seen.add(text)
                texts.append(text)
        rng.shuffle(texts)
        rows = [Row(question=QUESTION.format(docstring=text), answer=module) for text in texts[:per_module_max]]
        held_out += rows[:held_out_per_module]
        training += rows[held_out_per_module:]
    rng.shuffle(training)
    rng.shuffle(held_out)
    return training, held_out


def write_rows(rows: list[Row], path: Path) -> Path:
    """Writes the rows as JSONL."""
    path.write_text("".join(row.as_line() for row in rows), encoding="utf-8")
    return path
