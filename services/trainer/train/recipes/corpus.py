"""Text that every machine with Python has: the docstrings of its standard library, in a fixed order.

Reads sources, imports none.
"""

import ast
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path

DOCSTRING_CHARACTERS_MIN = 40
DOCSTRING_CHARACTERS_MAX = 4000
# Not text worth learning from: tests, generated tables, and what is installed on top.
_LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "pydoc_data", "__pycache__")


def standard_library_docstrings(pattern: str = "**/*.py") -> list[list[str]]:
    """Docstrings by file, cleaned of their indentation, files and docstrings in a fixed order, none twice."""
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    files = []
    for path in sorted(root.glob(pattern)):
        if any(part in _LEFT_OUT for part in path.relative_to(root).parts):
            continue
        texts = []
        for text in _docstrings(path):
            if len(text) >= DOCSTRING_CHARACTERS_MIN and text not in seen:
                seen.add(text)
                texts.append(text[:DOCSTRING_CHARACTERS_MAX])
        if texts:
            files.append(texts)
    return files


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        # Some versions ship files that are broken on purpose.
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield inspect.cleandoc(text)
