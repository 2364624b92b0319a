"""What is trained in the benchmark, and how: plain data that every side reads. It knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# `dpo` learns from pairs of answers, with an adapter.
Method = Literal["lora", "full", "dpo"]
METHODS: tuple[Method, ...] = ("lora", "full", "dpo")

THREADS = 2
SEED = 11
CONTEXT_LENGTH = 512
# Rows, or pairs of answers, of one optimizer step on every side that does not pack.
PER_STEP = {"lora": 16, "full": 16, "dpo": 8}
LORA_RANK = 16
LORA_ALPHA = 32
LEARNING_RATE = {"lora": 2e-3, "full": 5e-4, "dpo": 5e-4}
DPO_BETA = 0.1
GRADIENT_NORM_MAX = 1.0
# Length of a row in tokens: log-normal like chats and instructions are, cut at the context.
LENGTH_MEDIAN = 120
LENGTH_SIGMA = 0.7
LENGTH_MIN = 12
# The prompt's share of a row; only the completion carries loss.
PROMPT_SHARE = (0.25, 0.75)
HELD_OUT = 24
# Losses of two sides after the same tokens, or their speeds cannot be compared.
LOSS_TOLERANCE = 0.005


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama with tied embeddings. `rows` are trained once in a timed run, `pilot_rows` to find TRL's best setting;
    `pairs` of answers and `pilot_pairs` are the same of the method `dpo`, which a shape without pairs is not measured
    with. Settings that were far behind in the pilot of the shape `pilot_of`, if that was measured, are left out of this
    one's."""

    name: str
    vocabulary: int
    rows: int
    pilot_rows: int
    pairs: int = 0
    pilot_pairs: int = 0
    pilot_of: str = ""
    config: dict[str, Any]

    @property
    def methods(self) -> tuple[Method, ...]:
        return METHODS if self.pairs else METHODS[:2]

    def examples(self, method: Method, *, pilot: bool) -> int:
        if method == "dpo":
            return self.pilot_pairs if pilot else self.pairs
        return self.pilot_rows if pilot else self.rows


def _llama(width: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": width // heads,
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": True,
    }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="12M",
            vocabulary=32_000,
            rows=32,
            pilot_rows=16,
            pairs=16,
            pilot_pairs=8,
            config=_llama(256, 768, 5, 4),
        ),
        Shape(name="1M", vocabulary=2048, rows=64, pilot_rows=32, config=_llama(128, 384, 4, 4)),
        # The same vocabulary and the slowest runs: what is far behind at 12M is not tried again.
        Shape(name="30M", vocabulary=32_000, rows=16, pilot_rows=16, pilot_of="12M", config=_llama(384, 1024, 10, 6)),
    )
}
# The shape whose ratios are the last lines.
HEADLINE = "12M"
# A setting this many times slower than the best one of an earlier shape is far behind.
FAR_BEHIND = 1.5


@dataclass(frozen=True, kw_only=True)
class TrlSetting:
    """One way of running TRL; `batch_size` counts rows, packed sequences or pairs. Its loss over the vocabulary in
    chunks is always on. Activations are recomputed where `recomputes` says so, as it does by default; logs and saves
    are off."""

    name: str
    batch_size: int
    accumulation: int
    layout: Literal["padded", "grouped", "packed"]
    recomputes: bool = False
    # The reference's log-probabilities of all pairs come before the first step, on the clock.
    reference_first: bool = False


def _settings(per_step: int, *more: TrlSetting) -> dict[str, TrlSetting]:
    """Rows side by side in batches of 2 and 8, at random or grouped by length, with `per_step` of them in a step."""
    plain = (
        TrlSetting(name=f"{layout}-{size}", batch_size=size, accumulation=per_step // size, layout=layout)
        for layout in ("padded", "grouped")
        for size in (2, 8)
    )
    return {setting.name: setting for setting in (*plain, *more)}


# Packed sequences hold a few rows each: these steps see about as many tokens as those of 16 rows.
_SUPERVISED = _settings(
    16,
    TrlSetting(name="packed-2", batch_size=2, accumulation=3, layout="packed"),
    TrlSetting(name="packed-8", batch_size=8, accumulation=1, layout="packed"),
    TrlSetting(name="grouped-2-recomputed", batch_size=2, accumulation=8, layout="grouped", recomputes=True),
)
_PREFERENCES = _settings(
    8, TrlSetting(name="reference-first-2", batch_size=2, accumulation=4, layout="grouped", reference_first=True)
)
TRL_SETTINGS: dict[Method, dict[str, TrlSetting]] = {"lora": _SUPERVISED, "full": _SUPERVISED, "dpo": _PREFERENCES}
