"""The balancing loss of a mixture of experts is the one of transformers, over all rows of a step, however they lie."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from services.trainer.train.data.batches.micro_batch import Layout, MicroBatch, lay_out, without_labels
from services.trainer.train.data.tokens.token_rows import TokenRows
from services.trainer.train.loop.balance import balanced_loss, count_choices
from services.trainer.train.losses.objective import AdapterOff, Preferences, Supervised
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.modeling.lora import add_adapter
from services.trainer.train.modeling.routers import routers_of
from services.trainer.train.runtime.process_group import ALONE
from services.trainer.train.settings.failures import Failure
from services.trainer.train.settings.methods import Dpo
from services.trainer.train.settings.spec import LoraTraining

LENGTHS = (21, 9, 14, 5)
SHAPE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**_EXPERTS, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "olmoe": _EXPERTS,
    "granitemoe": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8},
    "jamba": {
        "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1,
        "expert_layer_offset": 0, "mamba_d_state": 8, "use_mamba_kernels": False, "mamba_dt_rank": 4,
    },
    "qwen3_next": {
        **_EXPERTS, "shared_expert_intermediate_size": 16, "head_dim": 8, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
}  # fmt: skip


def causal(family: str, coefficient: float = 0.5, **changes: Any) -> CausalModel:
    torch.manual_seed(0)
    named = "aux_loss_coef" if family == "jetmoe" else "router_aux_loss_coef"
    config = AutoConfig.for_model(family, **{**SHAPE, **MIXTURES.get(family, {}), named: coefficient, **changes})
    base = AutoModelForCausalLM.from_config(config).eval()
    return CausalModel(module=base, base=base, device="cpu", softcap=None, routers=routers_of(base))


def rows_of(lengths: tuple[int, ...] = LENGTHS, width: int = 1) -> TokenRows:
    return TokenRows(
        ids=np.random.default_rng(5).integers(3, 128, sum(lengths)).astype(np.int32),
        # The first half of a row is a question: it is balanced, too.
        labelled=np.concatenate([np.arange(length) > length // 2 for length in lengths]),
        offsets=np.cumsum([0, *lengths]).astype(np.int64),
        rows_per_example=width,
        rows=len(lengths) // width,
        truncated_rows=0,
        skipped_rows=0,
        longest_row_tokens=max(lengths),
    )


def batches_of(parts: list[list[int]], layout: Layout = "padded") -> list[MicroBatch]:
    rows = rows_of()
    return [lay_out(rows, part, layout=layout, device="cpu") for part in parts]


def of_transformers(model: CausalModel) -> Any:
    """One batch with all rows, as a user of transformers would lay it out."""
    rows = rows_of()
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for number, length in enumerate(LENGTHS):
        row, labelled = (torch.from_numpy(part) for part in rows.row(number))
        ids[number, :length] = row.long()
        mask[number, :length] = 1
        labels[number, :length] = torch.where(labelled, row.long(), -100)
    return model.base(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, output_router_logits=True)


def learn(model: CausalModel, batches: list[MicroBatch]) -> tuple[float, float]:
    """The mean loss and the balancing loss of a step; the gradients stay in the weights."""
    units = sum(batch.labelled for batch in batches)
    learning = sum(batch.labelled > 0 for batch in batches)
    choices = count_choices(model, batches, lambda: batches[0], ALONE) if learning > 1 else None
    total = balancing = 0.0
    for batch in batches:
        loss, own, part = balanced_loss(model, Supervised(), batch, 1 / units, 1.0, choices)
        loss.backward()
        total += own.item()
        balancing += 0.0 if part is None else part.item()
    return total, balancing


def gradients(model: CausalModel) -> dict[str, Any]:
    found = {name: weight.grad.clone() for name, weight in model.trainable.items() if weight.grad is not None}
    model.module.zero_grad()
    return found


@pytest.mark.parametrize("family", MIXTURES)
def test_loss_and_gradients_are_those_of_transformers(family: str) -> None:
    model = causal(family)
    assert model.routers is not None
    assert (model.routers.coefficient, model.routers.experts) == (0.5, 4)
    theirs = of_transformers(model)
    theirs.loss.backward()
    expected = gradients(model)
    loss, balancing = learn(model, batches_of([[0, 1, 2, 3]]))
    assert balancing == pytest.approx(theirs.aux_loss.item(), rel=1e-5)
    # What is told as the loss is that of the words alone.
    assert loss + 0.5 * balancing == pytest.approx(theirs.loss.item(), rel=1e-5)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("parts", [[[0, 1, 2, 3]], [[0], [1, 2], [3]], [[0], [1], [2], [3]]])
def test_a_step_is_balanced_alike_however_its_rows_lie(layout: Layout, parts: list[list[int]]) -> None:
    model = causal("mixtral")
    theirs = of_transformers(model)
    theirs.loss.backward()
    expected = gradients(model)
    _, balancing = learn(model, batches_of(parts, layout))
    assert balancing == pytest.approx(theirs.aux_loss.item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_batch_without_rows_of_its_own_counts_nothing() -> None:
    """A process that has no rows goes along in every pass."""
    model = causal("mixtral")
    batches = batches_of([[0], [1, 2, 3]])
    expected = learn(model, batches)
    own = gradients(model)
    assert learn(model, [*batches, without_labels(batches[0])]) == pytest.approx(expected)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, own[name])


def test_recomputed_activations_give_the_same_gradients() -> None:
    model = causal("mixtral")
    expected, own = learn(model, batches_of([[0, 1], [2, 3]])), gradients(model)
    model.base.gradient_checkpointing_enable({"use_reentrant": False})
    model.base.train()
    assert learn(model, batches_of([[0, 1], [2, 3]])) == pytest.approx(expected)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, own[name])


def test_an_adapter_learns_from_it_and_the_reference_of_pairs_is_not_heard() -> None:
    training = LoraTraining(r=4, alpha=8, dropout=0.0, target_modules=("q_proj", "v_proj"))
    found = {}
    for coefficient in (0.001, 5.0):
        model = add_adapter(causal("mixtral", coefficient), training, "m")
        for name, weight in model.trainable.items():
            if "lora_B" in name:
                torch.nn.init.constant_(weight, 0.1)
        batch = lay_out(rows_of(width=2), [0, 2], layout="padded", device="cpu", width=2)
        objective = Preferences(Dpo(), AdapterOff())
        loss, own, part = balanced_loss(model, objective, batch, 0.5, 1.0, None)
        loss.backward()
        assert loss.item() == pytest.approx(own.item() + coefficient * part.item())
        found[coefficient] = own.item(), part.item(), gradients(model)
    assert found[5.0][:2] == found[0.001][:2]
    first = next(iter(found[5.0][2]))
    assert not torch.allclose(found[5.0][2][first], found[0.001][2][first])


@pytest.mark.parametrize("family", MIXTURES)
def test_an_adapter_on_all_linear_layers_leaves_the_routers_to_be_heard(family: str) -> None:
    """Routers that are plain linear layers would get an adapter of their own, and their logits would be lost."""
    training = LoraTraining(r=3, alpha=8, dropout=0.0, target_modules="all-linear")
    model = add_adapter(causal(family), training, "m")
    batch = batches_of([[0, 1, 2, 3]])[0]
    loss, _, part = balanced_loss(model, Supervised(), batch, 1 / batch.labelled, 1.0, None)
    loss.backward()
    # The adapter is new: it changes nothing yet.
    assert part.item() == pytest.approx(of_transformers(causal(family)).aux_loss.item(), rel=1e-5)
    assert gradients(model)
    assert not any(".router.lora" in name for name in model.trainable)


def test_an_adapter_on_a_router_is_refused_by_name() -> None:
    training = LoraTraining(r=3, alpha=8, dropout=0.0, target_modules=("q_proj", "router"))
    with pytest.raises(Failure, match=r"on the router of a mixture of experts \(router\)") as caught:
        add_adapter(causal("jamba"), training, "m")
    assert [violation.field for violation in caught.value.violations] == ["training.target_modules"]


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("mixtral", {"router_aux_loss_coef": 0.0})])
def test_what_nobody_balances_learns_as_before(family: str, changes: dict[str, Any]) -> None:
    model = causal(family, **changes)
    assert model.routers is None
    batch = batches_of([[0, 1, 2, 3]])[0]
    loss, own, part = balanced_loss(model, Supervised(), batch, 1.0, 1.0, None)
    assert part is None
    assert torch.equal(own, loss.detach())
    assert torch.equal(own, Supervised().loss_sum(model, batch).detach())


def test_an_evaluation_hears_no_router() -> None:
    model = causal("mixtral")
    batch = batches_of([[0, 1, 2, 3]])[0]
    with torch.no_grad():
        loss = Supervised().sums(model, batch)[0] / batch.labelled
    theirs = of_transformers(model)
    assert loss == pytest.approx((theirs.loss - 0.5 * theirs.aux_loss).item(), rel=1e-5)
