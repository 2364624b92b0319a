"""Rules of the tree that import-linter cannot say: where torch and vllm may be imported,
and what pure modules may not."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ("formats", "chassis", "services", "client", "deploy")
HEAVY = {"torch", "transformers", "peft"}
HEAVY_ROOMS = ("services/trainer/train/", "services/inference/engines/")
VLLM_ROOM = "services/inference/engines/vllm.py"
IMPURE = {"grpc", "asyncpg", "nats", "os", "finemesh", "obstore", "socket", "subprocess"}
# Decisions that take facts and return facts; a test of theirs needs no server and no clock.
PURE = (
    "services/scheduler/attempts/attempt.py",
    "services/scheduler/attempts/progress.py",
    "services/scheduler/jobs/endings.py",
    "services/scheduler/jobs/job.py",
    "services/scheduler/jobs/lifecycle.py",
    "services/scheduler/nodes/node.py",
    "services/scheduler/placement/allocation.py",
    "services/scheduler/placement/leases.py",
    "services/scheduler/placement/policy.py",
    "services/scheduler/spec/defaults.py",
    "services/scheduler/spec/integrations.py",
    "services/scheduler/spec/origin.py",
    "services/scheduler/spec/tuning_limits.py",
    "services/scheduler/spec/tuning_spec.py",
    "services/scheduler/spec/violations.py",
    "services/scheduler/watching/hub.py",
    "services/billing/audit/chain_audit.py",
    "services/billing/audit/document_audit.py",
    "services/billing/audit/hold_audit.py",
    "services/billing/audit/job_audit.py",
    "services/billing/audit/usage_audit.py",
    "services/billing/prices/parse.py",
    "services/billing/prices/yaml.py",
    "services/billing/ledger/chain.py",
    "services/billing/usage/bounds.py",
    "services/billing/prices/pricing.py",
    "services/billing/prices/pricebook.py",
    "services/billing/ledger/entries.py",
    "services/billing/holds/settlement.py",
    "services/billing/invoices/invoice.py",
    "services/billing/budgets/credit.py",
    "services/billing/budgets/caps.py",
    "services/billing/calendar.py",
    "services/billing/usage/work_keys.py",
    "services/billing/invoices/documents/page.py",
    "services/billing/invoices/documents/pdf.py",
    "services/billing/invoices/documents/glyphs.py",
    "services/gateway/files/line_check.py",
    "services/gateway/identity/keys.py",
    "services/gateway/identity/rate_limit.py",
    "services/gateway/identity/domain.py",
    "services/inference/models/domain.py",
    "services/inference/endpoints/domain.py",
    "services/inference/endpoints/lifecycle.py",
    "services/inference/metering/domain.py",
    "services/inference/spending/states.py",
)


def sources() -> Iterator[Path]:
    for folder in CODE:
        yield from sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def test_torch_lives_in_the_training_engine_and_the_serving_engines_only() -> None:
    outside = [
        str(path.relative_to(ROOT))
        for path in sources()
        if imported(path) & HEAVY and not str(path.relative_to(ROOT)).startswith(HEAVY_ROOMS)
    ]
    assert outside == []


def test_vllm_is_imported_in_one_file() -> None:
    assert [str(p.relative_to(ROOT)) for p in sources() if "vllm" in imported(p)] == [VLLM_ROOM]


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_know_no_world(module: str) -> None:
    assert imported(ROOT / module) & IMPURE == set()


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
