"""Rows of a micro-batch see nothing of each other, in families of every kind; random weights, real classes."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from services.trainer.train.modeling import row_isolation
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.modeling.row_isolation import layout_that_isolates
from services.trainer.train.runtime.process_group import ALONE, Group
from services.trainer.train.settings.failures import Failure

SHAPE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
_DELTA = {
    "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Attention alone, with positions that start anew.
APART: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {
        "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
    },
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {**_EXPERTS, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}  # fmt: skip
# The state of a recurrence or a convolution runs on, or positions do (OPT and BLOOM count their own).
RUNS_ON: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": _DELTA,
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64, "head_dim": 8},
    "granitemoehybrid": {
        **_MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
    },
    "jamba": {
        "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8,
        "use_mamba_kernels": False, "mamba_dt_rank": 4,
    },
    "nemotron_h": {
        "hybrid_override_pattern": "M*-", "num_hidden_layers": 3, "mamba_num_heads": 8, "mamba_head_dim": 8,
        "ssm_state_size": 8, "chunk_size": 16, "head_dim": 8, "n_groups": 1,
    },
    "minimax": {
        "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "block_size": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
    "bloom": {"n_layer": 2, "n_head": 4},
}  # fmt: skip


def causal(family: str, changes: dict[str, Any]) -> CausalModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHAPE, **changes})
    base = AutoModelForCausalLM.from_config(config)
    return CausalModel(module=base, base=base, device="cpu", softcap=None)


@pytest.mark.parametrize("family", APART)
def test_rows_of_plain_attention_stay_packed(family: str) -> None:
    model = causal(family, APART[family])
    assert layout_that_isolates(model, "packed", ALONE) == ("packed", None)
    assert layout_that_isolates(model, "padded", ALONE) == ("padded", None)


@pytest.mark.parametrize("family", RUNS_ON)
def test_rows_that_would_see_each_other_are_padded(family: str) -> None:
    layout, found = layout_that_isolates(causal(family, RUNS_ON[family]), "packed", ALONE)
    assert layout == "padded"
    assert found is not None
    assert found.difference > 0.01


def test_an_architecture_whose_rows_see_the_padding_beside_them_is_refused() -> None:
    """A model that reads in both directions."""
    for wanted in ("packed", "padded"):
        with pytest.raises(Failure, match="BertLMHeadModel cannot be trained") as caught:
            layout_that_isolates(causal("bert", {}), wanted, ALONE)
        assert (caught.value.kind, caught.value.reason) == ("user", "MODEL_INVALID")


@pytest.mark.parametrize("family", ["llama", "mixtral", "lfm2"])
def test_the_noise_of_16_bits_is_no_difference(family: str) -> None:
    model = causal(family, {**APART, **RUNS_ON}[family])
    model.base.to(torch.bfloat16)
    expected = "packed" if family in APART else "padded"
    assert layout_that_isolates(model, "packed", ALONE)[0] == expected


def test_a_score_that_is_no_number_is_a_difference() -> None:
    model = causal("llama", {})
    with torch.no_grad():
        model.base.model.norm.weight.fill_(float("nan"))
    with pytest.raises(Failure, match="cannot be trained"):
        layout_that_isolates(model, "packed", ALONE)


def test_what_one_process_finds_counts_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a gang of unlike machines the kernels may differ, and all have to lay rows out alike."""
    asked: list[bool] = []

    def someone_else_found(_group: Group, flag: bool) -> bool:
        asked.append(flag)
        return len(asked) == 1

    monkeypatch.setattr(Group, "any", someone_else_found)
    layout, _ = layout_that_isolates(causal("llama", {}), "packed", Group(size=2))
    assert (layout, asked) == ("padded", [False, False])


def test_the_look_leaves_the_run_as_it_was() -> None:
    model = causal("llama", {"attention_dropout": 0.5})
    model.module.train()
    before = torch.get_rng_state()
    layout_that_isolates(model, "packed", ALONE)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.module.training
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert max(row_isolation._LENGTHS) < 64
