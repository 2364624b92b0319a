"""Mixtures of experts with parts that others lack, trained whole and proven: sinks in attention, which SDPA drops, and
routers whose balancing loss is learned from."""

from pathlib import Path
from typing import Any

import pytest

from services.trainer.train.recipes.model_shapes import Recipe
from tests.train import golden_runs
from tests.train.golden_runs import make_base, run

GPT_OSS = Recipe(
    name="gpt-oss",
    model_type="gpt_oss",
    config={
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.1,
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "router_aux_loss_coef": 0.9,
    },
    vocabulary=128,
)  # fmt: skip
# What a balanced router that chooses two experts has.
LEAST = 2.0


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What runs tell from here on."""
    told: list[dict[str, Any]] = []
    train = vars(golden_runs)["train"]

    def hear_all(spec: Any, workdir: Path, emit: Any, *more: Any) -> None:
        def both(kind: str, /, **fields: Any) -> None:
            told.append({"type": kind, **fields})
            emit(kind, **fields)

        train(spec, workdir, both, *more)

    monkeypatch.setattr(golden_runs, "train", hear_all)
    return told


def balancing(events: list[dict[str, Any]]) -> list[float]:
    return [step["balancing_loss"] for event in events if event["type"] == "progress" for step in event["steps"]]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_architecture_that_sdpa_cannot_take_is_trained_and_proven(
    method: str, tmp_path: Path, events: list[dict[str, Any]]
) -> None:
    make_base(GPT_OSS, tmp_path / "base")
    run(GPT_OSS, method, tmp_path / "base", tmp_path / "job")
    assert [event["type"] for event in events][-1] == "finished"
    assert [event for event in events if event["type"] == "exported"]
    assert min(balancing(events)) > LEAST
