"""Checks an adapter's config, shapes and numbers before an engine allocates anything for it. Not pure: disk.

It knows LoRA and the shapes that a base model's config implies; it refuses to know torch and engines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterRefused,
    LoraConfig,
    read_adapter_config,
)
from services.inference.engines.adapters.safetensors_file import FileProblem, Tensor, check_finite, read_header
from services.inference.engines.base import AdapterInvalid, EngineSettings

CONFIG_BYTES_MAX = 1 << 20

# Architectures that keep query, key and value in one matrix, and gate and up in another.
_FUSED_MODEL_TYPES = frozenset({"phi3"})

# Loading any of these would run a pickle.
_EXECUTABLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py"})
_TENSOR_NAME = re.compile(
    r"base_model\.model\.model\.layers\.(?P<layer>\d{1,5})\."
    r"(?P<module>(?:self_attn|mlp)\.[a-z_]{1,32})\.lora_(?P<side>[AB])\.weight"
)


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """What the check learnt: the largest rank of any module, the number of matrices and the bytes of their data."""

    rank: int
    matrices: int
    data_bytes: int


def check_adapter(
    revision: str, folder: Path, rank: int, base_config: Mapping[str, Any], limits: EngineSettings
) -> AdapterFacts:
    """Raise AdapterInvalid with the first thing that is wrong; read every byte once and hold at most a few MiB."""
    if limits.adapters_resident_max == 0:
        raise AdapterInvalid(revision, "this engine serves no adapters")
    try:
        _check_names(folder)
        config = _read_config(folder / ADAPTER_CONFIG, rank, limits)
        weights = _regular_file(folder / ADAPTER_WEIGHTS, limits.adapter_bytes_max)
        with weights.open("rb") as file:
            matrices = read_header(file, weights.stat().st_size)
            facts = _check_shapes(matrices, config, base_config)
            check_finite(file, matrices)
    except FileProblem as problem:
        raise AdapterInvalid(revision, f"{ADAPTER_WEIGHTS}: {problem}") from None
    except (_Problem, AdapterRefused) as problem:
        raise AdapterInvalid(revision, str(problem)) from None
    except OSError as error:
        raise AdapterInvalid(revision, f"cannot be read: {error.strerror or error}") from error
    return facts


class _Problem(Exception):
    """A finding; the public function adds the revision."""


def _check_names(folder: Path) -> None:
    if not folder.is_dir():
        raise _Problem("its folder does not exist")
    for entry in folder.iterdir():
        if entry.suffix.lower() in _EXECUTABLE_SUFFIXES:
            raise _Problem(f"{entry.name} is a format that can carry code; only safetensors are served")


def _regular_file(path: Path, bytes_max: int) -> Path:
    if path.is_symlink() or not path.is_file():
        raise _Problem(f"{path.name} is missing or not a regular file")
    size = path.stat().st_size
    if size > bytes_max:
        raise _Problem(f"{path.name} has {size} bytes, the limit is {bytes_max}")
    return path


def _read_config(path: Path, rank: int, limits: EngineSettings) -> LoraConfig:
    config = read_adapter_config(_regular_file(path, CONFIG_BYTES_MAX).read_bytes(), rank_max=limits.adapter_rank_max)
    if config.rank != rank:
        raise _Problem(f"its config says rank {config.rank}, the registry says {rank}")
    return config


def takes_adapters(base_config: Mapping[str, Any]) -> bool:
    """Whether this base model has the layers that adapters may change."""
    try:
        return bool(module_shapes(base_config))
    except (KeyError, TypeError, ValueError):
        return False


def has_experts(base_config: Mapping[str, Any]) -> bool:
    """Whether the base model is a mixture of experts."""
    text = base_config.get("text_config") or base_config
    return bool(text.get("num_local_experts") or text.get("num_experts"))


def module_shapes(base_config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(out features, in features) of each linear layer that an adapter may change, for Llama-shaped decoders; an engine
    prepares these and no others."""
    text = base_config.get("text_config") or base_config
    hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    key_value_heads = int(text.get("num_key_value_heads") or heads)
    head = int(text.get("head_dim") or hidden // heads)
    if text.get("model_type") in _FUSED_MODEL_TYPES:
        inner = int(text["intermediate_size"])
        return {
            "self_attn.qkv_proj": ((heads + 2 * key_value_heads) * head, hidden),
            "self_attn.o_proj": (hidden, heads * head),
            "mlp.gate_up_proj": (2 * inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
    shapes = {
        "self_attn.q_proj": (heads * head, hidden),
        "self_attn.k_proj": (key_value_heads * head, hidden),
        "self_attn.v_proj": (key_value_heads * head, hidden),
        "self_attn.o_proj": (hidden, heads * head),
    }
    # A mixture of experts has no dense layer of these names.
    if not has_experts(base_config):
        inner = int(text["intermediate_size"])
        shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    return shapes


def _check_shapes(matrices: Sequence[Tensor], config: LoraConfig, base_config: Mapping[str, Any]) -> AdapterFacts:
    try:
        shapes = module_shapes(base_config)
        layers = int((base_config.get("text_config") or base_config)["num_hidden_layers"])
    except (KeyError, TypeError, ValueError) as error:
        raise _Problem("adapters are not served on this architecture of base model") from error
    sides: dict[tuple[int, str], dict[str, int]] = {}
    for matrix in matrices:
        match = _TENSOR_NAME.fullmatch(matrix.name)
        if match is None or match["module"] not in shapes:
            raise _Problem(f"the base model has no layer for {matrix.name[:128]}")
        layer, module, side = int(match["layer"]), match["module"], match["side"]
        if layer >= layers:
            raise _Problem(f"{matrix.name} is for layer {layer}, the base model has {layers}")
        wide_out, wide_in = shapes[module]
        rank = matrix.shape[0] if side == "A" else matrix.shape[1]
        expected = (rank, wide_in) if side == "A" else (wide_out, rank)
        if matrix.shape != expected:
            raise _Problem(f"{matrix.name} has shape {list(matrix.shape)}, the base model needs {list(expected)}")
        sides.setdefault((layer, module), {})[side] = rank
    for (layer, module), ranks in sides.items():
        if len(ranks) != 2:
            raise _Problem(f"layer {layer} {module} has only lora_{next(iter(ranks))}")
        if ranks["A"] != ranks["B"]:
            raise _Problem(f"layer {layer} {module} has ranks {ranks['A']} and {ranks['B']}")
        config.check_module(f"model.layers.{layer}.{module}", ranks["A"])
    largest = max(ranks["A"] for ranks in sides.values())
    return AdapterFacts(
        rank=largest, matrices=len(matrices), data_bytes=sum(matrix.end - matrix.start for matrix in matrices)
    )
