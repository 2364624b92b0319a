"""The planner's choices, from numbers alone; tests/train/test_fit.py holds its predictions against measured
peaks."""

from dataclasses import replace

import pytest

from services.trainer.train.memory.memory_planner import (
    USABLE_SHARE,
    Devices,
    Layout,
    Shape,
    Work,
    choose,
    peak_bytes,
    shape_of,
)
from services.trainer.train.settings.failures import Failure

# The shape of a model with 8 billion weights.
LARGE = Shape(
    layers=32,
    width=4096,
    mlp_width=14336,
    query_width=4096,
    key_value_width=1024,
    vocabulary=128_256,
    tied=False,
    heads=32,
)
LORA = Work(rank=16, sequence_tokens=4096, step_tokens=65_536, micro_batch_tokens=16_384, head_rows=512)
FULL = replace(LORA, rank=None)


def on(count: int, gib: int) -> Devices:
    return Devices(count=count, memory_bytes=gib * 2**30, kind="cuda")


def test_the_shape_is_read_from_the_fields_that_families_share() -> None:
    config = {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    }
    assert shape_of(config) == LARGE
    assert LARGE.parameters == pytest.approx(8.03e9, rel=0.001)
    mixture = shape_of({**config, "num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": True})
    assert (mixture.experts, mixture.experts_per_token, mixture.tied) == (8, 2, True)
    with pytest.raises(KeyError):
        shape_of({"hidden_size": 4096})


def test_experts_may_have_a_width_of_their_own() -> None:
    """The fields of Qwen3-30B-A3B."""
    config = {
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151_936,
    }
    assert shape_of(config).parameters == pytest.approx(30.5e9, rel=0.005)
    assert shape_of({**config, "num_experts": None}).mlp_width == 6144


@pytest.mark.parametrize(("checkpointing", "layers_kept"), [(False, LARGE.layers), (True, 1)])
def test_an_adapter_of_experts_holds_their_weights_once_more(checkpointing: bool, layers_kept: int) -> None:
    """In every layer that is kept for the way back."""

    def peak(work: Work) -> int:
        return peak_bytes(mixture, work, kind="cpu", micro_batch_tokens=1, checkpointing=checkpointing)

    mixture = replace(LARGE, experts=8, experts_per_token=2)
    work = replace(LORA, rank=1, sequence_tokens=1, step_tokens=1, micro_batch_tokens=1, head_rows=1)
    experts = 3 * mixture.experts * mixture.width * mixture.mlp_width
    held = 4 * mixture.parameters + 16 * mixture.adapter_parameters(1)
    assert peak(work) - held == pytest.approx(4 * experts * layers_kept, rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_eager_attention_takes_memory_with_the_square_of_a_line(checkpointing: bool) -> None:
    def scores(line_tokens: int, tokens: int, *, capped: bool = False) -> int:
        work = replace(LORA, sequence_tokens=line_tokens, micro_batch_tokens=tokens)
        eager = replace(work, scored_line_tokens=line_tokens, capped_scores=capped)
        peak, without = (
            peak_bytes(LARGE, each, kind="cpu", micro_batch_tokens=tokens, checkpointing=checkpointing)
            for each in (eager, work)
        )
        return peak - without

    layers = 1 if checkpointing else LARGE.layers
    pairs = 4096 * 4096
    assert scores(4096, 4096) >= 4 * layers * LARGE.heads * pairs
    # Twice as many lines have twice as many pairs, and twice as long lines four times as many.
    assert scores(4096, 8192) == pytest.approx(2 * scores(4096, 4096), rel=0.1)
    assert scores(8192, 8192) == pytest.approx(4 * scores(4096, 4096), rel=0.1)
    assert scores(4096, 4096, capped=True) - scores(4096, 4096) == 4 * layers * LARGE.heads * pairs


def test_what_fits_as_it_is_stays_as_it_is() -> None:
    layout = choose(LARGE, LORA, on(1, 2000))
    assert (layout.parallelism, layout.micro_batch_tokens, layout.activation_checkpointing) == (
        "replicated",
        16_384,
        False,
    )
    assert layout.accumulation == 4


def test_less_memory_gives_smaller_micro_batches_then_recomputed_activations_then_shards() -> None:
    """The same rows in a step throughout: what a process takes less at a time it takes more often."""
    layouts = [choose(LARGE, LORA, on(1, gib)) for gib in (2000, 60, 30)]
    assert [layout.micro_batch_tokens * layout.accumulation for layout in layouts] == [65_536] * 3
    assert [layout.activation_checkpointing for layout in layouts] == [False, False, True]
    assert layouts[0].micro_batch_tokens > layouts[1].micro_batch_tokens == LORA.sequence_tokens
    assert all(layout.parallelism == "replicated" for layout in layouts)
    spread = choose(LARGE, FULL, on(8, 80))
    assert (spread.parallelism, spread.processes) == ("sharded", 8)
    assert spread.accumulation == -(-65_536 // (8 * spread.micro_batch_tokens))


@pytest.mark.parametrize(("work", "devices"), [(LORA, on(1, 80)), (LORA, on(2, 40)), (FULL, on(8, 80))])
def test_a_layout_is_what_the_formula_says_and_fits(work: Work, devices: Devices) -> None:
    layout = choose(LARGE, work, devices)
    assert layout.peak_bytes <= devices.memory_bytes * USABLE_SHARE
    assert layout.peak_bytes == peak_bytes(
        LARGE,
        work,
        kind="cuda",
        micro_batch_tokens=layout.micro_batch_tokens,
        checkpointing=layout.activation_checkpointing,
        processes=devices.count,
        shards=devices.count if layout.parallelism == "sharded" else 1,
    )


def test_who_asks_for_shards_gets_them() -> None:
    def asked(parallelism: str | None) -> Layout:
        return choose(LARGE, LORA, on(2, 2000), parallelism)  # type: ignore[arg-type]

    assert asked(None).parallelism == "replicated"
    assert asked("sharded").parallelism == "sharded"
    assert asked("sharded").peak_bytes < asked("replicated").peak_bytes


def test_micro_batches_go_down_to_one_longest_row() -> None:
    """A setting that is no power of two above the longest row does not stop half way."""
    work = replace(LORA, sequence_tokens=3000, micro_batch_tokens=4096)
    needed = peak_bytes(LARGE, work, kind="cuda", micro_batch_tokens=3000, checkpointing=False)
    devices = Devices(count=1, memory_bytes=int(needed / USABLE_SHARE) + 1, kind="cuda")
    assert choose(LARGE, work, devices).micro_batch_tokens == 3000


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(Failure) as refused:
        choose(LARGE, FULL, on(1, 80))
    failure = refused.value
    assert (failure.kind, failure.reason) == ("user", "JOB_TOO_LARGE")
    assert failure.details["available_bytes"] == str(int(80 * 2**30 * USABLE_SHARE))
    # 16 bytes for each weight: itself, its gradient and two moments.
    assert int(failure.details["needed_bytes"]) > 16 * LARGE.parameters
    assert "72.00 GiB of 80.00 GiB" in failure.message
    assert failure.violations[0].field == "max_seq_length"
