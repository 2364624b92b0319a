"""The one door to engines: what it refuses, and that asking for the light one loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from services.inference.engines.base import EngineFailed, EngineSettings
from services.inference.engines.choice import open_engine

LIGHT = """
import asyncio, pathlib, sys
from services.inference.engines.base import EngineSettings
from services.inference.engines.choice import open_engine
asyncio.run(open_engine("stub", pathlib.Path("."), EngineSettings()))
print(sorted(name for name in ("torch", "vllm", "transformers", "grpc") if name in sys.modules))
"""


async def test_an_unknown_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one of stub, vllm"):
        await open_engine("abacus", tmp_path, EngineSettings())


async def test_a_folder_without_a_model_does_not_start(tmp_path: Path) -> None:
    engine = await open_engine("stub", tmp_path, EngineSettings())
    with pytest.raises(EngineFailed, match=r"config\.json"):
        await engine.start()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EngineFailed, match="max_position_embeddings"):
        await engine.start()
    with pytest.raises(EngineFailed):
        await engine.health()


def test_the_stub_needs_nothing_heavy() -> None:
    root = Path(__file__).parents[3]
    answer = subprocess.run([sys.executable, "-c", LIGHT], cwd=root, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("limits", [{"adapter_rank_max": 0}, {"adapter_rank_max": 513}, {"adapters_known_max": 1}])
def test_limits_that_no_engine_can_keep_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="adapter"):
        EngineSettings(**limits)  # type: ignore[arg-type]
