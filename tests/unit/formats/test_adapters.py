"""What an adapter's config may say, what is refused by name, and the plain form that says the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.adapters import (
    ADAPTER_WEIGHTS,
    AdapterRefused,
    modules_of,
    parse_adapter_config,
    plain_adapter_config,
    read_adapter_config,
)

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
MODULES = tuple(f"model.layers.{layer}.{name}" for layer in range(12) for name in PROJECTIONS)
PREFIX = "base_model.model."


def read(**changes: Any) -> Any:
    return parse_adapter_config(PLAIN | changes, rank_max=64)


def refused(**changes: Any) -> str:
    with pytest.raises(AdapterRefused) as caught:
        read(**changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("init_lora_weights", "pissa", "PiSSA"),
        ("init_lora_weights", "pissa_niter_16", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "PiSSA", "PiSSA"),
        ("init_lora_weights", "olora", "OLoRA"),
        ("init_lora_weights", "corda", "CorDA"),
        ("init_lora_weights", "lora_ga", "LoRA-GA"),
        ("init_lora_weights", "loftq", "merge_and_unload"),
        ("init_lora_weights", "tomorrows", "not known here"),
        ("init_lora_weights", 3, "no initialisation"),
        ("use_dora", True, "DoRA"),
        ("bias", "all", "biases"),
        ("bias", "lora_only", "biases"),
        ("lora_bias", True, "bias"),
        ("fan_in_fan_out", True, "transposed"),
        ("modules_to_save", ["lm_head"], "whole layers"),
        ("trainable_token_indices", [1], "vocabulary"),
        ("layer_replication", [[0, 2]], "several times"),
        ("alora_invocation_tokens", [5, 6], "aLoRA"),
        ("alora_invocation_tokens", [], "aLoRA"),
        ("use_qalora", True, "QALoRA"),
        ("use_bdlora", {}, "BD-LoRA"),
        ("monteclora_config", {"x": 1}, "MonteCLoRA"),
        ("kasa_config", {}, "KaSA"),
        ("arrow_config", {"top_k": 1}, "Arrow"),
        ("velora_config", {}, "VeLoRA"),
        ("megatron_config", {"a": 1}, "Megatron"),
        ("of_tomorrow", True, "not known here"),
    ],
)  # fmt: skip
def test_what_means_something_else_is_refused_by_name(name: str, value: Any, said: str) -> None:
    message = refused(**{name: value})
    assert name in message
    assert said in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"task_type": "SEQ_CLS"}, "only CAUSAL_LM"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"r": 65}, "the largest rank that is taken is 64"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"use_rslora": 1}, "use_rslora is 1"),
        ({"rank_pattern": [1]}, "rank_pattern is not an object"),
        ({"rank_pattern": {"q_proj": 65}}, "rank_pattern['q_proj'] is 65"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern['q_proj'] is -1"),
        ({"target_modules": None}, "target_modules are missing"),
        ({"target_modules": []}, "target_modules are missing"),
        ({"target_modules": [1]}, "target_modules are not all names"),
        ({"target_modules": "[", "rank_pattern": {}}, "no regular expression"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1'"),
        ({"layers_pattern": "layers"}, "layers_to_transform, which is missing"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 1}, "not with an expression"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(changes: dict[str, Any], said: str) -> None:
    assert said in refused(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": start} for start in (True, False, None, "gaussian", "eva", "orthogonal", "mica")
    ]
    + [
        # What stays behind after a conversion: peft looks at it with that initialisation only.
        {"init_lora_weights": True, "corda_config": {"corda_method": "ipm"}, "loftq_config": {"loftq_bits": 4}},
        {"lora_dropout": 0.1, "inference_mode": True, "base_model_name_or_path": "a/b", "revision": "c"},
        {"of_tomorrow": None, "also_of_tomorrow": False, "and": [], "or": {}},
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_nothing_is_taken(changes: dict[str, Any]) -> None:
    assert read(**changes) == read()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"r": NaN' + b"[" * 100_000], ids=["no", "half", "list", "deep"]
)
def test_a_config_that_is_no_object_is_refused(content: bytes) -> None:
    with pytest.raises(AdapterRefused, match=r"adapter_config\.json"):
        read_adapter_config(content, rank_max=64)


NAMES = st.sampled_from(
    [
        "q_proj",
        "k_proj",
        "self_attn.v_proj",
        "layers.1.self_attn.q_proj",
        "1.mlp.up_proj",
        *MODULES[:3],
        "nothing",
        "proj",
    ]
)
EXPRESSIONS = st.sampled_from(
    [
        r".*\.(q|v)_proj",
        r"model\.layers\.[0-3]\..*_proj",
        r".*down_proj$",
        "q_proj",
        r".*\.1\d?\.mlp\..*j",
        "",
        "all-linear",
    ]
)
KEYS = st.sampled_from(
    ["q_proj", r"layers\.1\..*", "^model.layers.0.mlp.up_proj", "layers.1.self_attn.q_proj", r"(k|v)_proj", "proj", "x"]
)
CONFIGS = st.fixed_dictionaries(
    {
        "target_modules": st.lists(NAMES, min_size=1, max_size=4, unique=True) | EXPRESSIONS.filter(bool),
        "exclude_modules": st.none()
        | st.lists(NAMES, max_size=2, unique=True)
        | EXPRESSIONS.filter(lambda e: "lin" not in e),
        "rank_pattern": st.dictionaries(KEYS, st.integers(1, 8), max_size=3),
        "alpha_pattern": st.dictionaries(KEYS, st.integers(1, 32) | st.just(22.5), max_size=3),
        "use_rslora": st.booleans(),
    },
    optional={
        "layers_to_transform": st.none() | st.integers(0, 12) | st.lists(st.integers(0, 12), max_size=3),
        "layers_pattern": st.none() | st.sampled_from(["layers", ["layers"], "h", ["blocks", "layers"], []]),
    },
)


@settings(max_examples=100, deadline=None)
@given(changes=CONFIGS)
def test_the_plain_form_says_the_same_of_every_layer(changes: dict[str, Any]) -> None:
    try:
        ours = read(**changes)
    except AdapterRefused:
        return
    modules = [module for module in MODULES if ours.targets(module)]
    if not modules:
        return
    plain = read_adapter_config(plain_adapter_config(ours, modules, "acme/base"), rank_max=64)
    for module in MODULES:
        assert plain.targets(module) == ours.targets(module)
        if ours.targets(module):
            assert (plain.rank_of(module), plain.alpha_of(module)) == (ours.rank_of(module), ours.alpha_of(module))
            assert plain.scale_of(module) == ours.scale_of(module)


def test_matrices_name_their_layers() -> None:
    names = [f"{PREFIX}{MODULES[0]}.lora_{side}.weight" for side in "AB"]
    assert modules_of(names) == (MODULES[0],)
    with pytest.raises(AdapterRefused, match=f"only lora_A in {ADAPTER_WEIGHTS}"):
        modules_of(names[:1])
    for other in ("lora_magnitude_vector", "lora_embedding_A", "modules_to_save.weight", "lora_B.bias"):
        with pytest.raises(AdapterRefused, match="no matrix of a plain adapter"):
            modules_of([*names, f"{PREFIX}{MODULES[1]}.{other}"])


def test_matrices_that_the_config_leaves_out_are_refused() -> None:
    with pytest.raises(AdapterRefused, match="which its target_modules"):
        read().check_module("model.layers.0.self_attn.k_proj", 4)
    with pytest.raises(AdapterRefused, match="has rank 2; its config says 4"):
        read().check_module("model.layers.0.self_attn.q_proj", 2)
