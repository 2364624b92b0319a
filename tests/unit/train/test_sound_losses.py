"""No setting that is allowed makes a sound model look like one that is being destroyed; one that is destroyed is seen
under all of them."""

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from formats.rows import ROW_WEIGHT_MAX
from services.trainer.train.data.batches.micro_batch import MicroBatch, lay_out, without_labels
from services.trainer.train.data.tokens.token_rows import TokenRows
from services.trainer.train.losses.kto import Judged
from services.trainer.train.losses.objective import (
    Objective,
    Preferences,
    Supervised,
    answer_log_probs,
    is_sound,
)
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.settings.methods import (
    BETA_MAX,
    FEEDBACK_WEIGHT_MAX,
    RPO_ALPHA_MAX,
    SIMPO_GAMMA_MAX,
    Dpo,
    Kto,
)

VOCABULARY = 64
GUESS = math.log(VOCABULARY)
BETAS = st.floats(0.0, BETA_MAX, exclude_min=True)
DPO = st.builds(
    Dpo,
    beta=BETAS,
    normalize_logratios_by_length=st.booleans(),
    reference_free=st.booleans(),
    rpo_alpha=st.floats(0.0, RPO_ALPHA_MAX),
    simpo_gamma=st.just(0.0) | st.floats(0.0, SIMPO_GAMMA_MAX),
)
THUMBS = st.floats(0.0, FEEDBACK_WEIGHT_MAX, exclude_min=True)
KTO = st.builds(Kto, beta=BETAS, desirable_weight=THUMBS, undesirable_weight=THUMBS)
LENGTHS = st.lists(st.integers(2, 60), min_size=2, max_size=2) | st.lists(st.integers(2, 60), min_size=4, max_size=4)
WEIGHTS = st.none() | st.floats(0.0, ROW_WEIGHT_MAX)


class Itself:
    """The reference at the first step: the policy."""

    def log_probs(self, model: CausalModel, batch: MicroBatch) -> Any:
        with torch.no_grad():
            return answer_log_probs(model, batch)


@cache
def model(scale: float = 1.0) -> CausalModel:
    """A model of random weights. With a large `scale` it is sure of what it says, and wrong."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    base = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        base.lm_head.weight.mul_(scale)
    return CausalModel(module=base, base=base, device="cpu", softcap=None)


def batch_of(lengths: list[int], weight: float | None, width: int = 1) -> MicroBatch:
    """Rows whose tokens all carry loss but the first; the weight is that of every row."""
    rows = TokenRows(
        ids=(np.arange(sum(lengths), dtype=np.int32) * 7) % VOCABULARY,
        labelled=np.concatenate([np.arange(length) > 0 for length in lengths]),
        offsets=np.cumsum([0, *lengths]).astype(np.int64),
        weights=None if weight is None else np.full(len(lengths), weight, np.float32),
        rows_per_example=width,
        rows=len(lengths) // width,
        truncated_rows=0,
        skipped_rows=0,
        longest_row_tokens=max(lengths),
    )
    return lay_out(rows, range(0, len(lengths), width), layout="padded", device="cpu", width=width)


def is_sound_step(objective: Objective, batch: MicroBatch, policy: CausalModel) -> bool:
    units = objective.units(batch)
    loss = objective.loss_sum(policy, batch).item() / units
    return bool(is_sound(loss, float(objective.bound_sum(batch, GUESS)) / units))


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, weight=WEIGHTS)
def test_the_first_step_of_supervised_tuning_is_sound_with_any_weight(lengths: list[int], weight: float | None) -> None:
    assert is_sound_step(Supervised(), batch_of(lengths, weight), model())


@settings(max_examples=100, deadline=None)
@given(dpo=DPO, lengths=LENGTHS, weight=WEIGHTS)
def test_the_first_step_by_preferences_is_sound_with_any_settings(
    dpo: Dpo, lengths: list[int], weight: float | None
) -> None:
    objective = Preferences(dpo, Itself() if dpo.needs_reference else None)
    assert is_sound_step(objective, batch_of(lengths, weight, width=2), model())


@settings(max_examples=60, deadline=None)
@given(kto=KTO, lengths=LENGTHS, weight=st.floats(0.0, ROW_WEIGHT_MAX), good=st.booleans(), far=st.floats(0.0, 1e4))
def test_the_first_step_by_feedback_is_sound_with_any_settings(
    kto: Kto, lengths: list[int], weight: float, good: bool, far: float
) -> None:
    objective = Judged(kto, Itself(), Itself())
    objective.take(torch.tensor(far))
    assert is_sound_step(objective, batch_of(lengths, weight if good else -weight), model())


@pytest.mark.parametrize("weight", [None, 0.01, 1.0, 100.0])
def test_a_destroyed_model_is_seen_with_any_weight(weight: float | None) -> None:
    batch = batch_of([40, 9], weight)
    assert is_sound_step(Supervised(), batch, model())
    assert not is_sound_step(Supervised(), batch, model(1e4))


@settings(max_examples=60, deadline=None)
@given(dpo=DPO.filter(lambda dpo: dpo.beta > 0.01), weight=st.none() | st.floats(0.01, ROW_WEIGHT_MAX))
def test_a_policy_that_lost_its_preferred_answers_is_seen_with_any_settings(dpo: Dpo, weight: float | None) -> None:
    """Every token of the preferred answer costs thirty guesses, and the other one nothing."""
    policy, lengths = model(), [30, 20]
    batch = batch_of(lengths, weight, width=2)
    lost = torch.tensor([-30.0 * GUESS * (lengths[0] - 1), 0.0])
    objective = Preferences(dpo, _Fixed(torch.zeros(2)) if dpo.needs_reference else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.trainer.train.losses.objective.answer_log_probs", lambda _model, _batch: lost)
        assert not is_sound_step(objective, batch, policy)


class _Fixed:
    def __init__(self, scores: Any) -> None:
        self._scores = scores

    def log_probs(self, _model: CausalModel, _batch: MicroBatch) -> Any:
        return self._scores


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_what_is_no_number_is_never_sound(loss: float) -> None:
    assert not is_sound(loss, 1e9)
    assert not bool(is_sound(torch.tensor(loss), torch.tensor(1e9)))


def test_rows_without_labels_bound_nothing() -> None:
    """What a process computes along that has no rows must not raise the bound of the others."""
    for objective, width in (
        (Supervised(), 1),
        (Preferences(Dpo(), None), 2),
        (Judged(Kto(), Itself(), Itself()), 1),
    ):
        batch = without_labels(batch_of([5, 6], 3.0, width=width))
        assert float(objective.bound_sum(batch, 50.0)) == 0.0
