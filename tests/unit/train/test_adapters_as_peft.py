"""What an adapter's config says is what peft reads: the same layers, the same ranks, the same scale to the last bit."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from peft import LoraModel
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import LlamaConfig, LlamaForCausalLM

from formats.adapter_fields import FREE_FIELDS, READ_FIELDS, REFUSED_FIELDS
from formats.adapters import ADAPTER_CONFIG, AdapterRefused, parse_adapter_config, read_adapter_config
from tests.unit.formats.test_adapters import CONFIGS, MODULES, PLAIN, read

# peft says which keys of the patterns fit no layer, which is what is tried here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_every_field_of_peft_has_its_line() -> None:
    """A field that a newer peft adds is read, free or refused on purpose."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    named = READ_FIELDS | FREE_FIELDS | REFUSED_FIELDS.keys()
    assert fields - named == set()
    assert named - fields == set()
    assert len(READ_FIELDS) + len(FREE_FIELDS) + len(REFUSED_FIELDS) == len(named)


def test_what_peft_writes_by_itself_is_taken() -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]).to_dict()
    document = json.loads(json.dumps(config, default=list))
    assert parse_adapter_config(document, rank_max=4).targets("model.layers.0.self_attn.q_proj")


@settings(max_examples=200, deadline=None)
@given(changes=CONFIGS)
def test_layers_are_chosen_as_peft_chooses_them(changes: dict[str, Any]) -> None:
    try:
        theirs = peft.LoraConfig(**{name: value for name, value in (PLAIN | changes).items() if name != "peft_type"})
    except ValueError:
        # What peft itself does not take.
        with pytest.raises(AdapterRefused):
            read(**changes)
        return
    ours = read(**changes)
    for module in MODULES:
        if theirs.target_modules != "all-linear":
            assert ours.targets(module) == bool(check_target_module_exists(theirs, module)), module


class Layers(torch.nn.Module):
    """A few linear layers under the names of a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {
                    "self_attn": torch.nn.ModuleDict(
                        {n: torch.nn.Linear(8, 8) for n in ("q_proj", "k_proj", "v_proj")}
                    ),
                    "mlp": torch.nn.ModuleDict({n: torch.nn.Linear(8, 8) for n in ("up_proj", "down_proj")}),
                }
            )
            for _ in range(2)
        )


@settings(max_examples=60, deadline=None)
@given(changes=CONFIGS)
def test_every_layer_computes_what_pefts_own_forward_computes(changes: dict[str, Any]) -> None:
    """Rank, alpha and scale by their patterns, through peft's real layers: y - x W^T = scale * x A^T B^T."""
    changes = {name: value for name, value in changes.items() if not name.startswith(("layers_", "exclude_"))}
    if changes["target_modules"] in ("all-linear", "q_proj"):
        changes["target_modules"] = ["q_proj", "up_proj"]
    ours = read(**changes)
    torch.manual_seed(0)
    try:
        model = LoraModel(
            Layers(), peft.LoraConfig(**{n: v for n, v in (PLAIN | changes).items() if n != "peft_type"}), "default"
        )
    except ValueError as error:
        assert "not found" in str(error) or "No modules" in str(error), error
        return
    found = 0
    for name, layer in model.model.named_modules():
        if not hasattr(layer, "lora_A") or not ours.targets(name):
            assert not hasattr(layer, "lora_A"), name
            continue
        found += 1
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        ours.check_module(name, down.shape[0])
        inputs = torch.randn(3, 8)
        with torch.no_grad():
            delta = layer(inputs) - layer.base_layer(inputs)
            assert torch.allclose(delta, ours.scale_of(name) * (inputs @ down.T) @ up.T, atol=1e-4), name
    assert found == sum(
        ours.targets(name) for name in MODULES if name.startswith(("model.layers.0.", "model.layers.1."))
    )


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_a_refusal_tells_to_do_gives_an_adapter_that_is_taken(tmp_path: Path, start: str) -> None:
    """Converted by peft it computes on the untouched base what it computed on the changed one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    base = LlamaForCausalLM(config)
    untouched = copy.deepcopy(base)
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=start),
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(str(tmp_path / "as it is"))
    with pytest.raises(AdapterRefused, match="path_initial_model_for_weight_conversion"):
        read_adapter_config((tmp_path / "as it is" / ADAPTER_CONFIG).read_bytes(), rank_max=8)
    expected = model(torch.arange(8)[None]).logits
    model.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert read_adapter_config((tmp_path / "plain" / ADAPTER_CONFIG).read_bytes(), rank_max=8).rank == 4
    plain = peft.PeftModel.from_pretrained(untouched, str(tmp_path / "plain"))
    assert torch.allclose(plain(torch.arange(8)[None]).logits, expected, atol=1e-5)
