"""Which files of a hub's repository a run may start from, by their names and sizes alone."""

from typing import Any

import pytest

from services.trainer.integrations.hub.pull import FILES_MAX, SIDE_FILE_BYTES_MAX, _Unfit, chosen_files

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
