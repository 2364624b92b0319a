"""Which files of a hub's repository a run may start from, by their names and sizes alone, and what becomes of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from formats.adapters import AdapterRefused
from services.trainer.integrations.hub.pull import (
    FILES_MAX,
    SIDE_FILE_BYTES_MAX,
    _Unfit,
    _write_plainly,
    chosen_files,
)

ADAPTER = {"adapter_config.json": 9, "adapter_model.safetensors": 90}
WHOLE = {"config.json": 9, "model.safetensors": 90}
SHARDS = {"config.json": 9, "model.safetensors.index.json": 9} | {
    f"model-{number:05d}-of-00002.safetensors": 50 for number in (1, 2)
}
CODE = {"modeling_x.py": 1, "pytorch_model.bin": 90, "tokenizer.json": 5, "optimizer.safetensors": 10**12}


def choose(sizes: dict[str, int], kind: str, **wanted: Any) -> list[str]:
    return sorted(chosen_files(sizes, {"kind": kind, "bytes_max": 100, **wanted}))


def test_weights_and_what_describes_them_are_taken_and_nothing_else() -> None:
    assert choose(ADAPTER | CODE, "adapter") == sorted(ADAPTER)
    assert choose(WHOLE | CODE, "full") == sorted(WHOLE)
    assert choose(SHARDS | CODE, "full") == sorted(SHARDS)
    assert choose(WHOLE | SHARDS, "full") == sorted(WHOLE)


@pytest.mark.parametrize(
    ("sizes", "kind", "said"),
    [
        (WHOLE, "adapter", "no adapter_config.json, no adapter_model.safetensors; it holds a whole model"),
        (ADAPTER, "full", "no config.json, no model.safetensors; it holds an adapter"),
        ({"config.json": 9, "pytorch_model.bin": 90}, "full", "no model.safetensors; other weight formats"),
        ({}, "full", "no config.json"),
        ({name: size for name, size in SHARDS.items() if "00001-of" not in name}, "full", "all shards"),
        (SHARDS | {"model-00003-of-00003.safetensors": 1}, "full", "all shards"),
        (WHOLE | {"model.safetensors": 101}, "full", "101 bytes of weights are more than 100"),
        (SHARDS | {"model-00002-of-00002.safetensors": 51}, "full", "101 bytes of weights"),
        (ADAPTER | {"adapter_config.json": SIDE_FILE_BYTES_MAX + 1}, "adapter", "besides the weights"),
        (
            {"config.json": 1, "model.safetensors.index.json": 1}
            | {f"model-{number:05d}-of-{FILES_MAX:05d}.safetensors": 0 for number in range(1, FILES_MAX + 1)},
            "full",
            "more than 256 files",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_or_too_much_is_said(sizes: dict[str, int], kind: str, said: str) -> None:
    with pytest.raises(_Unfit, match=said):
        choose(sizes, kind)


def test_an_adapter_that_was_pulled_has_the_plainest_config(tmp_path: Path) -> None:
    """Also the ranks of its matrices are those that it says, or it is refused before any device is taken."""
    names = [f"base_model.model.model.layers.{layer}.mlp.up_proj" for layer in range(2)]
    tensors = {f"{name}.lora_A.weight": np.zeros((2 + at, 4), np.float32) for at, name in enumerate(names)}
    tensors |= {f"{name}.lora_B.weight": np.zeros((4, 2 + at), np.float32) for at, name in enumerate(names)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ".*up_proj"}
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterRefused, match=r"layers\.1\.mlp\.up_proj has rank 3; its config says 2"):
        _write_plainly(tmp_path)
    path.write_text(json.dumps(config | {"rank_pattern": {r"layers\.[1-9]+\..*": 3}}))
    _write_plainly(tmp_path)
    plain = json.loads(path.read_text())
    assert plain["target_modules"] == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert plain["rank_pattern"] == {r"^model\.layers\.1\.mlp\.up_proj": 3}
