"""The program that pushes a model, with the real huggingface_hub against a hub in this process.
Each test starts it once or twice."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.trainer.integrations.hub.repository import PUSH_PROGRAM
from services.trainer.integrations.programs import environment_of
from tests.harness.hub import Hub, running_hub

TOKEN = "hf_token-77ab03e5"
ROOT = Path(__file__).parents[3]
WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub(TOKEN) as running:
        yield running


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (folder / "adapter_config.json").write_text('{"r": 4}')
    (folder / "left-out.txt").write_text("not named")
    return folder


def run(hub: Hub, export: Path, **changes: Any) -> tuple[dict[str, Any], str]:
    """The answer, and everything that the program wrote anywhere."""
    wanted = {
        "endpoint": hub.url,
        "token": TOKEN,
        "repository": "acme/tuned",
        "folder": str(export),
        "files": ["adapter_model.safetensors", "adapter_config.json"],
        "message": "ft-1 rv_1",
        **changes,
    }
    home = export.parent / "home"
    home.mkdir(exist_ok=True)
    environment = environment_of({**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}", "HF_TOKEN": "not ours"}, home)
    with subprocess.Popen(
        [sys.executable, "-m", PUSH_PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd=ROOT,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        # As the agent does: the input stays open until the answer is there.
        process.stdin.write(json.dumps(wanted) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        process.stdin.close()
        errors = process.stderr.read()
    left = "".join(path.read_text(errors="replace") for path in home.rglob("*") if path.is_file())
    return json.loads(line), line + errors + left


def test_a_model_arrives_whole_and_a_second_push_changes_nothing(hub: Hub, export: Path) -> None:
    told, written = run(hub, export)
    repository = hub.repositories["acme/tuned"]
    assert repository.files == {"adapter_model.safetensors": WEIGHTS, "adapter_config.json": b'{"r": 4}'}
    assert repository.private
    assert told["commit"] == repository.commits[-1][0]
    count = len(repository.commits)
    again, _ = run(hub, export)
    assert "error" not in again
    assert len(repository.commits) == count
    assert TOKEN not in written


def test_a_repository_that_is_there_keeps_what_it_has(hub: Hub, export: Path) -> None:
    hub.repository("acme/tuned", {"README.md": b"# ours", "adapter_config.json": b"{}"})
    run(hub, export)
    assert set(hub.repositories["acme/tuned"].files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert hub.repositories["acme/tuned"].files["adapter_config.json"] == b'{"r": 4}'


def test_a_wrong_token_is_told_without_it_and_not_tried_again(hub: Hub, export: Path) -> None:
    told, written = run(hub, export, token="hf_wrong-5150")
    assert "401" in told["error"]
    assert told["retryable"] is False
    assert "hf_wrong-5150" not in written
    assert hub.repositories == {}


def test_a_hub_that_breaks_or_is_away_may_be_tried_again(hub: Hub, export: Path) -> None:
    hub.failures["/commit/"] = [500]
    told, _ = run(hub, export)
    assert told["retryable"] is True
    assert "500" in told["error"]
    away, written = run(hub, export, endpoint="http://127.0.0.1:9")
    assert away["retryable"] is True
    assert "signature" not in written
