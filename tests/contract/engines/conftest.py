"""One engine of each kind for the whole session; a real vLLM takes some twenty seconds to start, so it starts once."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file

from services.inference.engines.answer_form import AnswerParsers
from services.inference.engines.base import Engine, EngineSettings
from services.inference.engines.choice import open_engine
from tests.contract.engines.tiny_llama import build_adapter, build_base

RANK = 8
SETTINGS = EngineSettings(
    sequences_max=2,
    queue_requests_max=4,
    kv_cache_bytes=128 << 20,
    adapters_in_batch_max=2,
    adapters_resident_max=2,
    adapter_rank_max=16,
    parsers=AnswerParsers(tool="hermes"),
    # Two cores are shared by an engine, this process and the one that reads answers.
    guide_s_max=60.0,
    answer_part_s_max=60.0,
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An engine under test with the base model it runs on."""

    kind: str
    engine: Engine
    base: Path


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def adapters(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of rank 8: one more than fits into the engine's memory at once."""
    root = tmp_path_factory.mktemp("adapters")
    return [build_adapter(base_model, root / str(seed), rank=RANK, seed=seed) for seed in (1, 2, 3)]


@pytest_asyncio.fixture(scope="session", params=["stub", "vllm"])
async def subject(request: pytest.FixtureRequest, base_model: Path) -> AsyncIterator[Subject]:
    engine = await open_engine(request.param, base_model, SETTINGS)
    await engine.start()
    yield Subject(kind=request.param, engine=engine, base=base_model)
    await engine.stop()


@pytest.fixture(
    params=["truncated", "rank over limit", "not a number", "wrong shapes", "foreign base", "pickle", "missing"]
)
def broken_adapter(
    request: pytest.FixtureRequest, base_model: Path, adapters: list[Path], tmp_path: Path
) -> tuple[Path, int, str]:
    """An adapter folder, the rank its owner claims, and words that the error must contain."""
    folder = tmp_path / "adapter"
    shutil.copytree(adapters[0], folder)
    weights = folder / "adapter_model.safetensors"
    match request.param:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
            return folder, RANK, "bytes where its header describes"
        case "rank over limit":
            return build_adapter(base_model, tmp_path / "wide", rank=32), 32, "32; the largest rank that is taken is 16"
        case "not a number":
            matrices = load_file(weights)
            next(iter(matrices.values()))[0, 0] = float("nan")
            save_file(matrices, weights)
            return folder, RANK, "not numbers"
        case "wrong shapes":
            matrices = load_file(weights)
            name = next(iter(matrices))
            save_file(matrices | {name: matrices[name][:, :-1].contiguous()}, weights)
            return folder, RANK, "has shape"
        case "foreign base":
            other = build_base(tmp_path / "other", layers=3)
            return build_adapter(other, tmp_path / "foreign", rank=RANK), RANK, "layer 2, the base model has 2"
        case "pickle":
            (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
            return folder, RANK, "can carry code"
        case _:
            return tmp_path / "nowhere", RANK, "does not exist"
