"""A file, a folder and a function stay small enough to read at one go, and a name means one thing."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
CODE = ("chassis", "formats", "services", "client", "deploy", "bench")
# Where the dotted name of a module begins: `client/` is on the path, the other folders are packages.
IMPORT_ROOTS = {"client": ROOT / "client"}
LINES_MEDIAN, LINES_MAX, MODULES_MAX, FUNCTION_LINES_MAX = 130, 400, 20, 70
# Names that say a module's kind. Everywhere else a name is a subject, and a subject has one module.
KINDS = {"__init__", "__main__", "main", "config", "store", "convert", "domain", "errors"}
# Names that stand twice because they mean the same: two lifecycles, two sets of limits. Everything else is unique.
MEANINGS = {
    "job_folders": "the files that jobs leave in the artifact store, and what of them stays after the end",
    "lifecycle": "the states of one thing and the table of moves between them",
    "limits": "the largest values that are taken as meant",
    "paging": "how a list is cut into pages, by who serves it and by who reads it",
    "retention_rules": "which rows of one service go when",
    "transitions": "the moves of a lifecycle, with what they record and announce",
}


def sources(*kinds: str) -> Iterator[Path]:
    for folder in CODE:
        for kind in kinds:
            yield from sorted((ROOT / folder).rglob(f"*.{kind}"))


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def line_count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def dotted(path: Path) -> str:
    top = IMPORT_ROOTS.get(path.relative_to(ROOT).parts[0], ROOT)
    parts = path.relative_to(top).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_each_migration_has_a_number_of_its_own() -> None:
    """Two that were written side by side merge without a conflict, and then no service starts."""
    numbers = Counter(
        (named(path.parent), path.name.partition("_")[0]) for path in (ROOT / "services").glob("*/migrations/*.sql")
    )
    assert {number: count for number, count in numbers.items() if count > 1} == {}


def test_half_of_the_sources_fit_on_two_screens() -> None:
    assert median(line_count(path) for path in sources("py", "sql")) <= LINES_MEDIAN


def test_no_source_is_too_long_to_read_at_one_go() -> None:
    assert [named(path) for path in sources("py", "sql") if line_count(path) > LINES_MAX] == []


def test_no_folder_holds_more_modules_than_one_can_look_over() -> None:
    folders = Counter(named(path.parent) for path in sources("py") if path.stem != "__init__")
    assert {folder: count for folder, count in folders.items() if count > MODULES_MAX} == {}


def test_no_function_is_longer_than_a_screen() -> None:
    long = []
    for path in sources("py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    long.append(f"{named(path)}::{node.name} has {lines} lines")
    assert long == []


def imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """The first-party modules that a file imports anywhere: in functions and under TYPE_CHECKING as well."""
    package = dotted(path) if path.stem == "__init__" else dotted(path).rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from package import module` needs the module; `from module import name` the module named.
                inner = f"{source}.{alias.name}"
                found.add(inner if inner in modules else source)
    return (found & modules.keys()) - {dotted(path)}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that reach each other, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for target in sorted(graph[module]):
            if target not in order:
                visit(target)
                lowest[module] = min(lowest[module], lowest[target])
            elif target in stack:
                lowest[module] = min(lowest[module], order[target])
        if lowest[module] == order[module]:
            at = stack.index(module)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                found.append(sorted(group))

    for module in sorted(graph):
        if module not in order:
            visit(module)
    return found


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {dotted(path): path for path in sources("py")}
    assert circles({name: imports(path, modules) for name, path in modules.items()}) == []


def test_a_name_means_one_thing_in_the_whole_tree() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in sources("py"):
        if path.stem not in KINDS:
            places[path.stem].append(named(path))
    several = {name: paths for name, paths in places.items() if len(paths) > 1}
    assert {name: paths for name, paths in several.items() if name not in MEANINGS} == {}
    assert MEANINGS.keys() <= several.keys(), "a name that stands once needs no entry"
