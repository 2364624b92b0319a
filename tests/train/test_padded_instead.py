"""A run whose rows would see each other in one line: it says so and trains as if every row were alone."""

from pathlib import Path
from typing import Any

import pytest

from services.trainer.train.data.batches import run_batches
from services.trainer.train.loop import start_run
from services.trainer.train.recipes.model_shapes import Recipe
from tests.train import golden_runs
from tests.train.golden_runs import make_base, run

LFM2 = Recipe(
    name="lfm2",
    model_type="lfm2",
    config={
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 256, "initializer_range": 0.3, "block_multiple_of": 8,
        "layer_types": ["conv", "full_attention"],
    },
    vocabulary=128,
)  # fmt: skip


def packs_where_it_may(_device: str, *, padded: bool = False) -> str:
    """What a GPU does."""
    return "padded" if padded else "packed"


@pytest.mark.parametrize("method", ["full", "kto"])
def test_a_convolution_is_trained_on_rows_as_if_alone(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    make_base(LFM2, base)
    alone = run(LFM2, method, base, tmp_path / "alone", micro_batch_tokens=64)
    events: list[dict[str, Any]] = []
    train = vars(golden_runs)["train"]

    def hear_all(spec: Any, workdir: Path, emit: Any, *more: Any) -> None:
        def both(kind: str, /, **fields: Any) -> None:
            events.append({"type": kind, **fields})
            emit(kind, **fields)

        train(spec, workdir, both, *more)

    monkeypatch.setattr(golden_runs, "train", hear_all)
    for module in (start_run, run_batches):
        monkeypatch.setattr(module, "layout_for", packs_where_it_may)
    found = run(LFM2, method, base, tmp_path / "device", micro_batch_tokens=64)
    assert found == alone
    (told,) = [event for event in events if event["type"] == "warning"]
    assert told["code"] == "ROWS_PADDED"
    assert told["message"].startswith("Lfm2ForCausalLM lets rows that are packed into one line see each other (")
    # What was quoted is what is metered: pads cost nothing.
    (started,) = [event for event in events if event["type"] == "started"]
    metered = sum(event["train_tokens"] for event in events if event["type"] == "progress")
    assert metered == started["train_token_count"] * 2
