"""Gradients that are added where they are kept are those that autograd makes, and nothing of a vocabulary's size is
made for them."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from services.trainer.train.data.batches.micro_batch import MicroBatch
from services.trainer.train.losses import cross_entropy as loss_module
from services.trainer.train.losses.cross_entropy import cross_entropy_sum
from services.trainer.train.losses.objective import Objective, Preferences, Supervised
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.modeling.in_place_gradients import keep_gradients_in_place
from services.trainer.train.settings.methods import Dpo
from tests.train.full_lines import full_lines

VOCABULARY, WIDTH = 512, 64
PAD = 3
# Lines and tokens of the micro-batches of a step; the logits of one are smaller than the head.
BATCHES = [(2, 12), (2, 9), (4, 5)]

Gradients = dict[str, Any]


def model_of(kind: str = "llama", *, tied: bool = True, in_place: bool, recomputes: bool = False) -> CausalModel:
    torch.manual_seed(5)
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        tie_word_embeddings=tied, pad_token_id=PAD,
        use_cache=False,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    assert base.get_input_embeddings().padding_idx == PAD
    if recomputes:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    if in_place:
        keep_gradients_in_place(base, linear=True)
    base.train()
    return CausalModel(module=base, base=base, device="cpu", softcap=None, in_place=in_place)


def batches() -> list[MicroBatch]:
    """The pad's id is among the tokens that are learned from."""
    made = []
    for lines, length in BATCHES:
        ids = torch.randint(0, VOCABULARY, (lines, length), generator=torch.Generator().manual_seed(length))
        ids[0, 2] = PAD
        made.append(full_lines(ids, torch.linspace(0.5, 2.0, lines)))
    return made


def gradients(model: CausalModel, objective: Objective) -> Gradients:
    for batch in batches():
        objective.loss_sum(model, batch, 0.25).backward()
    return {name: value.grad for name, value in model.trainable.items()}


@pytest.mark.parametrize("objective", [Supervised(), Preferences(Dpo(reference_free=True), None)], ids=["sft", "dpo"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"tied": False}, {"kind": "qwen2"}, {"recomputes": True}],
    ids=["tied", "untied", "with-biases", "recomputed"],
)
def test_gradients_are_those_of_autograd(settings: dict[str, Any], objective: Objective) -> None:
    expected = gradients(model_of(in_place=False, **settings), objective)
    found = gradients(model_of(in_place=True, **settings), objective)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize("factors", [None, torch.linspace(0.5, 2.0, 33)])
def test_the_heads_gradient_is_added_scaled_to_what_is_there(factors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", 7)
    torch.manual_seed(0)
    hidden = torch.randn(33, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(0, 50, (33,))
    plain = cross_entropy_sum(hidden, weight, labels, factors=factors)
    expected = torch.autograd.grad(plain, [hidden, weight])
    for times in (1, 2):
        scaled = cross_entropy_sum(hidden, weight, labels, factors=factors, scale=0.125, in_place=True)
        scaled.backward()
        torch.testing.assert_close(scaled, 0.125 * plain)
        torch.testing.assert_close(weight.grad, times * 0.125 * expected[1], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(hidden.grad, times * 0.125 * expected[0], rtol=1e-4, atol=1e-6)


def test_a_look_without_gradients_leaves_none() -> None:
    model = model_of(in_place=True)
    with torch.no_grad():
        for batch in batches():
            assert Supervised().loss_sum(model, batch) == pytest.approx(
                Supervised().loss_sum(model_of(in_place=False), batch).item(), rel=1e-6
            )
    assert all(value.grad is None for value in model.trainable.values())


class Large(TorchDispatchMode):
    """Counts operations that make a tensor as large as the vocabulary's weights, beside those that are kept."""

    def __init__(self, kept: set[int]) -> None:
        super().__init__()
        self._kept = kept
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            isinstance(result, torch.Tensor)
            and result.numel() >= VOCABULARY * WIDTH
            and result.data_ptr() not in self._kept
        ):
            self.made.append(str(func))
        return result


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_nothing_of_the_vocabularys_size_is_made_for_a_micro_batch(in_place: bool, tied: bool) -> None:
    model = model_of(in_place=in_place, tied=tied)
    first, *more = batches()
    Supervised().loss_sum(model, first).backward()
    weights = model.trainable.values()
    with Large({tensor.data_ptr() for value in weights for tensor in (value, value.grad)}) as large:
        for batch in more:
            Supervised().loss_sum(model, batch).backward()
    assert bool(large.made) is not in_place, large.made
