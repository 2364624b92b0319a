"""Tiny base models and small jobs for the engine, and a way to run the child as the agent does."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from services.trainer.train.loop import run as loop
from services.trainer.train.loop.state import Run
from services.trainer.train.recipes.main import make
from services.trainer.train.recipes.model_shapes import RECIPES
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import load_spec

WORDS = [
    "open",
    "read",
    "write",
    "close",
    "socket",
    "stream",
    "event",
    "loop",
    "task",
    "future",
    "lock",
    "queue",
    "file",
    "path",
    "name",
]


def conversations(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows of very different lengths, some of two turns, all distinct."""
    rows = []
    for number in range(start, start + count):
        words = [WORDS[(number * 7 + position * 3) % len(WORDS)] for position in range(3 + number * number % 37)]
        messages = [
            {"role": "user", "content": f"{number}: {' '.join(words)}"},
            {"role": "assistant", "content": " ".join(reversed(words[:6]))},
        ]
        if number % 3 == 0:
            messages += [{"role": "user", "content": "again"}, {"role": "assistant", "content": words[0]}]
        rows.append({"messages": messages})
    return rows


def preferences(count: int, start: int = 0) -> list[dict[str, Any]]:
    """The preferred answer repeats the question's words, the other one does not; lengths differ."""
    rows = []
    for number in range(start, start + count):
        words = [WORDS[(number * 5 + position * 2) % len(WORDS)] for position in range(2 + number % 9)]
        rows.append(
            {
                "input": {"messages": [{"role": "user", "content": f"{number}: {' '.join(words)}"}]},
                "preferred_output": [{"role": "assistant", "content": " ".join(words)}],
                "non_preferred_output": [{"role": "assistant", "content": " ".join(["no"] * (1 + number % 5))}],
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_job(workdir: Path, base: Path, **changes: Any) -> Path:
    """A work folder: 24 training and 6 validation rows, 12 steps of 4 rows in 2 epochs, 4 evaluations."""
    write_rows(workdir / "inputs" / "train.jsonl", conversations(24))
    write_rows(workdir / "inputs" / "held.jsonl", conversations(6, start=100))
    spec = {
        "job_id": "ft-test",
        "base_model": {"directory": str(base), "id": f"finemesh/{base.name}", "revision": "rv_test"},
        "train_file": "inputs/train.jsonl",
        "validation_file": "inputs/held.jsonl",
        "training": {"type": "lora", "r": 4, "dropout": 0.1},
        "epochs": 2,
        "evaluations": 2,
        "batch_size": 4,
        "packing": False,
        "learning_rate": 5e-3,
        "warmup_ratio": 0.1,
        "checkpoint_every_steps": 2,
        "seed": 3,
        **changes,
    }
    (workdir / "spec.json").write_text(json.dumps(spec))
    return workdir


def run_job(workdir: Path, stop_after: int | None = None) -> list[dict[str, Any]]:
    """Runs a job in this process and returns what it told. `stop_after` is the last step that it does: the run is asked
    to stop when its loop, in its own thread, is through with that step's evaluation and checkpoint. The event of the
    checkpoint would not do: it is told when the files are there, which may be steps later."""
    events: list[dict[str, Any]] = []
    done, whole = 0, vars(loop)["checkpoint_when_due"]

    def emit(kind: str, /, **fields: Any) -> None:
        events.append({"type": kind, **fields})

    def last_of_a_step(run: Run) -> None:
        nonlocal done
        whole(run)
        done = run.position.step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "checkpoint_when_due", last_of_a_step)
        spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
        loop.train(spec, workdir, emit, lambda: stop_after is not None and done >= stop_after)
    assert [event["step"] for event in events if event["type"] == "stopped"] in ([], [stop_after])
    return events


@contextmanager
def held_port() -> Iterator[int]:
    """A port for children to meet at. A socket that does not listen holds it, so that nobody else is lent it in the
    seconds until the leading child, who may share it, listens there."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.fixture(scope="session", autouse=True)
def one_kind_of_sum() -> None:
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes each recipe once a session."""
    root = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            make(RECIPES[name], folder, cache=None)
        return folder

    return get


@pytest.fixture
def make_job(base_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """`write_job` by the names of a job and of a recipe."""

    def get(name: str = "job", *, model: str = "tiny-llama", **changes: Any) -> Path:
        return write_job(tmp_path / name, base_model(model), **changes)

    return get


def _children() -> Iterator[Any]:
    """Starts the child with its standard input held open; kills what is left at the end."""
    children: list[subprocess.Popen[str]] = []

    def spawn(
        workdir: Path, *arguments: str, module: str = "services.trainer.train.main", **environment: str
    ) -> "subprocess.Popen[str]":
        errors = (workdir / "stderr.txt").open("a")
        child = subprocess.Popen(
            [sys.executable, "-m", module, *(arguments or ("--workdir", str(workdir)))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        )
        errors.close()
        children.append(child)
        return child

    yield spawn
    for child in children:
        child.kill()
        child.wait()


spawn_child = pytest.fixture(_children, name="spawn_child")
spawn_module_child = pytest.fixture(_children, name="spawn_module_child", scope="module")
