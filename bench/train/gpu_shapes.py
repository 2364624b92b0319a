"""What is trained in the benchmark on a GPU, and how: plain data that both sides read. It knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Dense bf16, without sparsity, from the vendor's data sheets.
# A device's name begins with the key; the longest key counts.
PEAK_FLOPS = {
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
}
# Under an adapter the weights' own gradients are not made: 2 in the forward pass and 2 in the backward pass.
FLOP_PER_WEIGHT_AND_TOKEN = 4
WARM_STEPS = 2
LEARNING_RATE = 1e-4
ROW_LENGTH_MEDIAN = 400


@dataclass(frozen=True, kw_only=True)
class GpuShape:
    """`lengths` are those of packed sequences; every step has `step_tokens` tokens of them."""

    name: str
    vocabulary: int
    lengths: tuple[int, ...]
    step_tokens: int
    timed_steps: int
    rounds: int
    config: dict[str, Any]

    def sequences_per_step(self, length: int) -> int:
        return self.step_tokens // length

    @property
    def context_length(self) -> int:
        return max(self.lengths)


GPU_SHAPES = {
    shape.name: shape
    for shape in (
        GpuShape(
            name="8B",
            vocabulary=128_256,
            lengths=(2048, 4096, 8192),
            step_tokens=16_384,
            timed_steps=8,
            rounds=3,
            config={
                "hidden_size": 4096,
                "intermediate_size": 14_336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
                "tie_word_embeddings": False,
            },
        ),
        # To see on any machine that both sides run.
        GpuShape(
            name="tiny",
            vocabulary=512,
            lengths=(128, 256),
            step_tokens=512,
            timed_steps=2,
            rounds=1,
            config={
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "tie_word_embeddings": False,
            },
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class GpuSetting:
    """`batch_size` counts packed sequences that are computed at once;
    `attention` is an implementation of transformers, which the engine chooses itself."""

    batch_size: int
    recomputes: bool
    attention: str = ""
    liger: bool = False


OUR_SETTINGS = {
    "1": GpuSetting(batch_size=1, recomputes=False),
    "1-recomputed": GpuSetting(batch_size=1, recomputes=True),
    "2-recomputed": GpuSetting(batch_size=2, recomputes=True),
}
# One that a machine has no library or memory for is said to fail and left out.
GPU_TRL_SETTINGS = {
    "flash-1": GpuSetting(batch_size=1, recomputes=False, attention="flash_attention_2"),
    "flash-1-liger": GpuSetting(batch_size=1, recomputes=False, attention="flash_attention_2", liger=True),
    "flash-1-recomputed": GpuSetting(batch_size=1, recomputes=True, attention="flash_attention_2"),
    "flash-2-recomputed-liger": GpuSetting(batch_size=2, recomputes=True, attention="flash_attention_2", liger=True),
    "flex-1-recomputed": GpuSetting(batch_size=1, recomputes=True, attention="flex_attention"),
    "sdpa-1": GpuSetting(batch_size=1, recomputes=False, attention="sdpa"),
    "sdpa-1-liger": GpuSetting(batch_size=1, recomputes=False, attention="sdpa", liger=True),
    "sdpa-1-recomputed": GpuSetting(batch_size=1, recomputes=True, attention="sdpa"),
    "sdpa-2-recomputed": GpuSetting(batch_size=2, recomputes=True, attention="sdpa"),
}


def peak_flops(device_name: str) -> float | None:
    """None for a device that the table does not have."""
    known = [name for name in PEAK_FLOPS if device_name.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def mfu(tokens_per_s: float, weights: int, device_name: str) -> float | None:
    """The share of the device's dense bf16 peak that goes into the model's own arithmetic under an adapter."""
    peak = peak_flops(device_name)
    return None if peak is None else tokens_per_s * FLOP_PER_WEIGHT_AND_TOKEN * weights / peak
