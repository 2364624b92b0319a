"""Who takes an adapter takes the same ones: a run that starts from it, the pull before that run, and an engine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from formats.adapter_fields import FREE_FIELDS, INITIALISATIONS, PLAIN_INITIALISATIONS, READ_FIELDS, REFUSED_FIELDS
from formats.adapters import RANK_MAX, AdapterRefused
from services.inference.engines.adapters.adapter_check import check_adapter
from services.inference.engines.base import AdapterInvalid, EngineSettings
from services.trainer.integrations.hub.pull import _write_plainly
from services.trainer.train.modeling.start_adapter import adapter_of_start
from services.trainer.train.settings.failures import Failure
from services.trainer.train.settings.spec import LoraTraining

BASE = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
LIMITS = EngineSettings(adapter_rank_max=RANK_MAX)
VALUES = (
    st.sampled_from([None, True, False, 0, 1, 2, 4, "", "none", "all", "all-linear", ".*q_proj", "q_proj", [], {}])
    | st.sampled_from([["q_proj"], ["k_proj"], [5, 6], [0], {"q_proj": 2}, {"q_proj": 4}, {"(": 1}, {"a": {}}])
    | st.sampled_from(sorted([*INITIALISATIONS, *PLAIN_INITIALISATIONS, "pissa_niter_4", "of_tomorrow"]))
)
FIELDS = st.sampled_from(sorted(READ_FIELDS | FREE_FIELDS | REFUSED_FIELDS.keys() | {"of_tomorrow"}))


def served(folder: Path) -> str:
    """Why an engine refuses it; nothing when it does not."""
    try:
        check_adapter("rv_1", folder, 2, BASE, LIMITS)
    except AdapterInvalid as refused:
        return str(refused).removeprefix("adapter rv_1: ")
    return ""


def started(folder: Path) -> str:
    """Why a run does not start from it."""
    start = SimpleNamespace(directory=str(folder), repository="acme/x", named="acme/x")
    training = LoraTraining(r=2, alpha=4, dropout=0.0, target_modules="all-linear")
    spec: Any = SimpleNamespace(start_from=start, training=training)
    try:
        adapter_of_start(spec)
    except Failure as refused:
        return refused.message.partition("these settings: ")[2]
    return ""


def pulled(folder: Path) -> str:
    """Why it is not taken from a hub; when it is, its config is rewritten."""
    try:
        _write_plainly(folder)
    except AdapterRefused as refused:
        return str(refused)
    return ""


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(FIELDS, VALUES, max_size=3))
def test_all_doors_take_the_same_adapters(tmp_path: Path, changes: dict[str, Any]) -> None:
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    matrices = {
        f"{prefix}.lora_A.weight": np.ones((2, 8), np.float32), f"{prefix}.lora_B.weight": np.ones((8, 2), np.float32),
    }  # fmt: skip
    save_file(matrices, tmp_path / "adapter_model.safetensors")
    document = PLAIN | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(document))
    answers = [served(tmp_path), started(tmp_path), pulled(tmp_path)]
    # A registry knows a rank of its own, a run a rank and an alpha; the rest is the config's.
    if any(words.startswith(("its config says rank", "the adapter's r is")) for words in answers):
        assert all(answers)
    else:
        assert answers[0] == answers[2]
        # Which layers are in the file is not looked at where the settings alone are read.
        assert answers[1] in ("", answers[0]) or answers[1].startswith("the adapter's lora_alpha")
    if answers[2] == "" and answers[0] == "":
        assert served(tmp_path) == ""


@pytest.mark.parametrize("name", ["pissa", "olora", "corda", "loftq", "lora_ga"])
def test_a_changed_base_is_named_alike_at_every_door(tmp_path: Path, name: str) -> None:
    save_file({"x": np.ones((2, 8), np.float32)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN | {"init_lora_weights": name}))
    assert served(tmp_path) == started(tmp_path) == pulled(tmp_path) != ""
    assert f"init_lora_weights is {name!r}" in served(tmp_path)
