"""Rules of the tree that import-linter cannot say: where torch and vllm may be imported, which file touches what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ("formats", "chassis", "services", "client", "deploy")
HEAVY = {"torch", "transformers", "peft"}
HEAVY_ROOMS = ("services/trainer/train/", "services/inference/engines/")
VLLM_ROOMS = [
    "services/inference/engines/answers/answer_program.py",
    "services/inference/engines/checks/engine_check.py",
    "services/inference/engines/vllm.py",
    "services/inference/engines/vllm_cpu.py",
    "services/inference/engines/vllm_words.py",
]
IMPURE = {"grpc", "asyncpg", "nats", "os", "finemesh", "obstore", "socket", "subprocess"}
# The doors to the world in the chassis itself; to import one is to touch what is behind it.
DOORS = ("chassis.bus", "chassis.db", "chassis.objects", "chassis.rpc")
# Files whose name says what they touch: handlers, SQL, protobuf, wiring.
TOUCHING = re.compile(r"(\w+_service|(\w+_)?store|convert|main|config)\.py")
# Everything else is pure, unless the first line of its docstring says what it touches. The training engine, the client
# and the launcher have contracts of their own.
DECLARED = re.compile(r"Not pure: \S.*\.")
ROOMS = ("formats/", "services/")
EXEMPT = "services/trainer/train/"
# Only a store runs queries.
SQL = {"load_queries"}


def sources() -> Iterator[Path]:
    for folder in CODE:
        yield from sorted((ROOT / folder).rglob("*.py"))


def rooms() -> Iterator[Path]:
    """The modules that hold to the kinds of files."""
    for path in sources():
        place = path.relative_to(ROOT).as_posix()
        if place.startswith(ROOMS) and not place.startswith(EXEMPT):
            yield path


def imported_modules(path: Path) -> set[str]:
    """All modules that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
    return found


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports."""
    return {name.split(".")[0] for name in imported_modules(path)}


def imported_names(path: Path) -> set[str]:
    """What a file takes out of modules by name."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}


def first_line(path: Path) -> str:
    """Of the docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def test_torch_lives_in_the_training_engine_and_the_serving_engines_only() -> None:
    outside = [
        str(path.relative_to(ROOT))
        for path in sources()
        if imported(path) & HEAVY and not str(path.relative_to(ROOT)).startswith(HEAVY_ROOMS)
    ]
    assert outside == []


def test_vllm_is_imported_where_it_serves() -> None:
    assert [str(p.relative_to(ROOT)) for p in sources() if "vllm" in imported(p)] == VLLM_ROOMS


def test_what_is_not_pure_says_so() -> None:
    silent = []
    for path in rooms():
        touched = {name for name in imported_modules(path) if name.split(".")[0] in IMPURE or name.startswith(DOORS)}
        if touched and not TOUCHING.fullmatch(path.name) and not DECLARED.search(first_line(path)):
            silent.append(f"{path.relative_to(ROOT)}: {', '.join(sorted(touched))}")
    assert silent == []


def test_only_stores_load_queries_and_theirs_lie_beside_them() -> None:
    loading = {path for path in rooms() if SQL & imported_names(path)}
    assert {path.relative_to(ROOT) for path in loading if not path.stem.endswith("store")} == set()
    with_sql = {path.parent for path in (ROOT / "services").rglob("queries*.sql")}
    assert {path.parent for path in loading} == with_sql


@pytest.mark.parametrize("service", ["gateway", "scheduler", "trainer", "billing", "inference"])
def test_a_daemon_starts_without_the_heavy_libraries(service: str) -> None:
    code = f"import sys, services.{service}.main; print(*sorted({HEAVY | {'vllm'}!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


def test_public_contracts_import_no_internal_ones() -> None:
    public = {"common", "files", "tuning", "models", "endpoints", "inference", "billing", "identity"}
    crossings = []
    for path in sorted((ROOT / "protos" / "finemesh").rglob("*.proto")):
        area = path.relative_to(ROOT / "protos" / "finemesh").parts[0]
        for line in path.read_text(encoding="utf-8").splitlines():
            if area in public and line.startswith('import "finemesh/'):
                target = line.split("/")[1]
                if target not in public:
                    crossings.append(f"{path.name} imports {target}")
    assert crossings == []


def test_nothing_is_read_or_opened_at_import() -> None:
    """No module outside config.py and the command line touches the environment when it is imported."""
    readers = []
    for path in sources():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for part in ast.walk(node):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.If):
                    break
                if isinstance(part, ast.Attribute) and part.attr in ("environ", "getenv"):
                    readers.append(str(path.relative_to(ROOT)))
    assert readers == []
