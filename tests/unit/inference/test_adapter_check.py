"""What the adapter check refuses, header by header. No engine and no torch is needed to say no."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats.adapters import AdapterRefused
from services.inference.engines.adapters import import_program
from services.inference.engines.adapters.adapter_check import check_adapter, module_shapes, takes_adapters
from services.inference.engines.base import AdapterInvalid, EngineSettings

BASE = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
}
LIMITS = EngineSettings(adapter_rank_max=8, adapter_bytes_max=1 << 16)
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "bias": "none",
    "target_modules": ["q_proj"],
}
Header = dict[str, Any]


def write_adapter(
    folder: Path, *, config: Any = CONFIG, change: Callable[[Header], Any] = lambda header: header
) -> Path:
    """A valid rank 4 adapter for q_proj of both layers, with its header passed through `change`."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    header: Header = {}
    data = b""
    for layer in range(2):
        for side, shape in (("A", [4, 16]), ("B", [16, 4])):
            raw = np.full(shape, 0.5, dtype="<f4").tobytes()
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight"
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
    changed = json.dumps(change(header)).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(changed)) + changed + data)
    return folder


def check(folder: Path, rank: int = 4, limits: EngineSettings = LIMITS) -> None:
    check_adapter("rv_x", folder, rank, BASE, limits)


def first(header: Header) -> Header:
    entry: Header = next(iter(header.values()))
    return entry


def with_first(**changes: Any) -> Callable[[Header], Header]:
    def change(header: Header) -> Header:
        first(header).update(changes)
        return header

    return change


def renamed(new: str) -> Callable[[Header], Header]:
    return lambda header: {new if at == 0 else name: entry for at, (name, entry) in enumerate(header.items())}


def test_a_sound_adapter_passes(tmp_path: Path) -> None:
    facts = check_adapter("rv_x", write_adapter(tmp_path / "a"), 4, BASE, LIMITS)
    assert (facts.rank, facts.matrices, facts.data_bytes) == (4, 4, 4 * 64 * 4)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda _: {}, "holds 0 matrices"),
        (lambda _: [], "not a JSON object"),
        (with_first(dtype="I64"), "has dtype I64"),
        (with_first(dtype=None), "has dtype None"),
        (with_first(shape=[64]), "not a matrix"),
        (with_first(shape=[4, 16, 1]), "not a matrix"),
        (with_first(shape=[-4, -16]), "not a matrix"),
        (with_first(shape=[True, 64]), "not a matrix"),
        (with_first(shape=[1 << 40, 1 << 40]), "do not match its shape"),
        (with_first(shape=[2, 16]), "do not match its shape"),
        (with_first(shape=[8, 8]), "has shape"),
        (with_first(data_offsets=[256, 512]), "overlaps"),
        (with_first(data_offsets=[0, 1 << 60]), "do not match its shape"),
        (with_first(data_offsets=None), "do not match its shape"),
        (renamed("lm_head.weight"), "no layer for lm_head.weight"),
        (renamed("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight\n"), "no layer for"),
        (renamed("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"), "layer 7, the base model has 2"),
        (renamed("base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"), "only lora_"),
        (renamed("base_model.model.model.layers.0.mlp.experts.lora_A.weight"), "no layer for"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, change: Callable[[Header], Any], problem: str) -> None:
    with pytest.raises(AdapterInvalid, match=problem):
        check(write_adapter(tmp_path / "a", change=change))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ([], "not a JSON object"),
        (CONFIG | {"peft_type": "IA3"}, "only LORA"),
        (CONFIG | {"task_type": "SEQ_CLS"}, "only CAUSAL_LM"),
        (CONFIG | {"bias": "all"}, "biases"),
        (CONFIG | {"use_dora": True}, "use_dora"),
        (CONFIG | {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (CONFIG | {"init_lora_weights": "pissa"}, "pissa"),
        (CONFIG | {"r": 0}, "r is 0"),
        (CONFIG | {"r": "4"}, "r is '4'"),
        (CONFIG | {"r": 2}, "the registry says 4"),
        (CONFIG | {"rank_pattern": {"q_proj": 9}}, "the largest rank that is taken is 8"),
        (CONFIG | {"rank_pattern": {"q_proj": 2}}, "has rank 4; its config says 2"),
        (CONFIG | {"target_modules": ["k_proj"]}, "which its target_modules, exclude_modules"),
        (CONFIG | {"layers_to_transform": [0]}, "which its target_modules, exclude_modules"),
        (CONFIG | {"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        (CONFIG | {"rank_pattern": [9]}, "not an object"),
        (CONFIG | {"lora_alpha": None}, "lora_alpha"),
        (CONFIG | {"lora_alpha": float("inf")}, "lora_alpha"),
        (CONFIG | {"alpha_pattern": {"q_proj": -1}}, "q_proj"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path: Path, config: Any, problem: str) -> None:
    with pytest.raises(AdapterInvalid, match=problem):
        check(write_adapter(tmp_path / "a", config=config))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("dtype", "shift"), [("<f4", 0), ("<f2", 0), ("<f4", 16)])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float, dtype: str, shift: int) -> None:
    # A bfloat16 is the upper half of a float32.
    matrix = np.full((4, 16), 0.5, dtype=dtype)
    matrix[3, 15] = value
    raw = (matrix.view("<u4") >> shift).astype("<u2").tobytes() if shift else matrix.tobytes()
    name = {"<f4": "BF16" if shift else "F32", "<f2": "F16"}[dtype]
    folder = write_adapter(tmp_path / "a")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    other = np.full((16, 4), 0.5, dtype="<f4").tobytes()
    header = json.dumps(
        {
            f"{prefix}A.weight": {"dtype": name, "shape": [4, 16], "data_offsets": [0, len(raw)]},
            f"{prefix}B.weight": {"dtype": "F32", "shape": [16, 4], "data_offsets": [len(raw), len(raw) + len(other)]},
        }
    ).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + raw + other)
    with pytest.raises(AdapterInvalid, match="holds values that are infinite"):
        check(folder)


def test_files_out_of_bounds_are_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for content, problem in (
        (b"", "no header"),
        (whole[:100], "truncated"),
        (whole[:-1], "bytes where its header describes"),
        (whole + b"\0", "bytes where its header describes"),
        (struct.pack("<Q", 1 << 62) + whole[8:], "header claims"),
        (struct.pack("<Q", 3) + b"{,}", "not JSON"),
        (struct.pack("<Q", 14) + b'{"a":1,"a":1}\n', "not JSON"),
        (bytes(1 << 17), "the limit is 65536"),
    ):
        weights.write_bytes(content)
        with pytest.raises(AdapterInvalid, match=problem):
            check(folder)


def test_links_pickles_and_missing_parts_are_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    with pytest.raises(AdapterInvalid, match="does not exist"):
        check(tmp_path / "nowhere")
    (folder / "training_args.BIN").write_bytes(b"\x80")
    with pytest.raises(AdapterInvalid, match="can carry code"):
        check(folder)
    (folder / "training_args.BIN").unlink()
    weights = folder / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    with pytest.raises(AdapterInvalid, match="missing"):
        check(folder)
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterInvalid, match="not a regular file"):
        check(folder)


def test_an_engine_without_adapters_says_so(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="serves no adapters"):
        check(write_adapter(tmp_path / "a"), limits=EngineSettings(adapters_resident_max=0))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(at=st.integers(min_value=0, max_value=600), byte=st.integers(min_value=0, max_value=255))
def test_any_changed_byte_of_the_header_is_survived(tmp_path: Path, at: int, byte: int) -> None:
    folder = write_adapter(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[at] = byte
    weights.write_bytes(content)
    try:
        check(folder)
    except AdapterInvalid as error:
        assert error.revision == "rv_x"


def test_shapes_follow_the_base_model() -> None:
    assert module_shapes(BASE)["self_attn.k_proj"] == (8, 16)
    assert module_shapes(BASE | {"head_dim": 8})["self_attn.o_proj"] == (16, 32)
    assert module_shapes({"text_config": BASE})["mlp.down_proj"] == (16, 32)
    assert "mlp.up_proj" not in module_shapes(BASE | {"num_local_experts": 8})
    assert takes_adapters(BASE)
    assert not takes_adapters({"n_embd": 768})


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r".*\.q_proj"},
        # Layers without matrices are as the base has them, as in peft, which begins with a product of zero.
        {"target_modules": ["q_proj", "k_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*(k|v|o|up|down|gate)_proj"},
        {"target_modules": ["self_attn.q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"r": 4, "rank_pattern": {"^model.layers.1.self_attn.q_proj": 4}, "alpha_pattern": {"q_proj": 3}},
        {"use_rslora": True, "init_lora_weights": "eva", "eva_config": {"rho": 1.0}},
    ],
    ids=["expression", "some", "all but", "layers", "patterns", "rslora"],
)
def test_what_peft_means_by_its_config_is_served(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert check_adapter("rv_x", write_adapter(tmp_path / "a", config=CONFIG | changes), 4, BASE, LIMITS).matrices == 4


def test_of_what_lies_beside_an_import_the_ends_alone_are_kept(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    ends = folder / "generation_config.json"
    asked = {"folder": str(folder), "base_config": BASE | {"vocab_size": 10}, "rank_max": 8, "bytes_max": 1 << 16}
    ends.write_text('{"eos_token_id": [9, 3], "temperature": 0.1}')
    assert import_program.check(asked) == 4
    assert json.loads(ends.read_text()) == {"eos_token_id": [3, 9]}
    ends.write_text('{"eos_token_id": 10}')
    with pytest.raises(AdapterRefused, match="lists 10, which is no token of the base model"):
        import_program.check(asked)
