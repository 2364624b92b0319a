"""How much memory a run needs and how to lay it out on given devices: pure arithmetic on a model's shape.

It counts weights, the optimizer's moments, the gradients, what the forward pass saves for the backward pass, and a
chunk of the vocabulary head. The terms are those of Korthikanti et al. 2022 (Reducing Activation Recomputation in Large
Transformer Models), adapted to the modules of this engine. It knows no torch, no file and no device but its size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from services.trainer.train.settings.failures import Failure, Violation, user_failure
from services.trainer.train.settings.limits import MICRO_BATCH_TOKENS_MIN

Parallelism = Literal["replicated", "sharded"]
Kind = Literal["cpu", "cuda"]

# What is left for allocators, kernels' work space and the libraries themselves.
USABLE_SHARE = 0.9
# A chunk's logits, and beside them what they are made of where the weights have 16 bits.
LOGITS_COPIES = {"cpu": 1, "cuda": 2}
_FLOAT32, _BFLOAT16 = 4, 2
_MOMENTS = 2


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder of transformers: counts and widths, from its config.json. With several experts `mlp_width` is the width
    of each."""

    layers: int
    width: int
    mlp_width: int
    query_width: int
    key_value_width: int
    vocabulary: int
    tied: bool
    experts: int = 1
    experts_per_token: int = 1
    heads: int = 1

    @property
    def layer_parameters(self) -> int:
        attention = 2 * self.width * (self.query_width + self.key_value_width)
        mlp = 3 * self.width * self.mlp_width * self.experts
        router = self.width * self.experts if self.experts > 1 else 0
        return attention + mlp + router + 2 * self.width

    @property
    def outer_parameters(self) -> int:
        return self.vocabulary * self.width * (1 if self.tied else 2) + self.width

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.outer_parameters

    def adapter_parameters(self, rank: int) -> int:
        """On every linear layer but the head."""
        widths = 4 * self.width + 2 * self.query_width + 2 * self.key_value_width
        widths += 3 * (self.width + self.mlp_width) * self.experts
        return rank * self.layers * widths


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is trained. `rank` is the adapter's, None for all weights. `sequence_tokens` is the longest row (for
    preferences the longest pair). `step_tokens` is what an optimizer step takes on all devices together. The vocabulary
    head makes `head_rows` rows of logits at once. A run that `evaluates` scores rows without learning from them, in
    micro-batches of the size that was set. `scored_line_tokens` is the longest line of a micro-batch where attention
    holds a score for every pair of tokens in a line (eager attention), and 0 where it holds none; `capped_scores` pass
    through tanh, which keeps them for the way back once more."""

    rank: int | None
    sequence_tokens: int
    step_tokens: int
    micro_batch_tokens: int
    head_rows: int
    evaluates: bool = False
    scored_line_tokens: int = 0
    capped_scores: bool = False


@dataclass(frozen=True, kw_only=True)
class Devices:
    """`memory_bytes` of each of `count` like devices. On `cuda` a frozen base is held in 16 bits."""

    count: int
    memory_bytes: int
    kind: Kind


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run lies on its devices, one process on each; `accumulation` is micro-batches of a process in a step, and
    `peak_bytes` what each device needs for it."""

    processes: int
    parallelism: Parallelism
    micro_batch_tokens: int
    accumulation: int
    activation_checkpointing: bool
    peak_bytes: int


def shape_of(config: Mapping[str, Any]) -> Shape:
    """From the fields of config.json that the families share. Raises KeyError or TypeError where one is missing."""
    heads = int(config["num_attention_heads"])
    head_width = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 1)
    # Where experts have a width of their own, intermediate_size is that of layers without experts.
    expert_width = config.get("moe_intermediate_size") if experts > 1 else None
    return Shape(
        layers=int(config["num_hidden_layers"]),
        width=int(config["hidden_size"]),
        mlp_width=int(expert_width or config["intermediate_size"]),
        query_width=heads * head_width,
        key_value_width=int(config.get("num_key_value_heads") or heads) * head_width,
        vocabulary=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        experts=experts,
        experts_per_token=int(config.get("num_experts_per_tok") or 1),
        heads=heads,
    )


def peak_bytes(
    shape: Shape,
    work: Work,
    *,
    kind: Kind,
    micro_batch_tokens: int,
    checkpointing: bool,
    processes: int = 1,
    shards: int = 1,
) -> int:
    """The most that one device holds at once. The peak is at the vocabulary head, when everything is saved and nothing
    is used up; or at the end of the backward pass, when every gradient is there; or in an evaluation."""
    tokens = min(max(micro_batch_tokens, work.sequence_tokens), max(work.step_tokens, work.sequence_tokens))
    held = _weights(shape, work, kind) + _moments(shape, work) + _copies(shape, work, kind, shards)
    logits = _logits(shape, work, tokens, kind)
    gradients = _FLOAT32 * _trainable(shape, work)
    whole_unit = 0
    if shards > 1:
        held, gradients = -(-held // shards), -(-gradients // shards)
        # One layer, or what is around the layers, is whole at a time; with its gradient when it is trained.
        unit = max(shape.layer_parameters, shape.outer_parameters)
        whole_unit = unit * _weight_bytes(work, kind) * (2 if work.rank is None else 1)
    width = _weight_bytes(work, kind)
    layer = _layer_elements(shape, work, tokens) * width + _scores(shape, work, tokens, width)
    inputs = tokens * shape.width * width * (shape.layers + 1)
    passing = tokens * (3 * shape.mlp_width * shape.experts_per_token + _expert_copies(shape)) * width
    passing = max(passing, _passing_scores(shape, work, tokens))
    if checkpointing:
        at_head = inputs + _head(shape, work, tokens)
        in_backward = inputs + layer + passing
    else:
        at_head = shape.layers * layer + _head(shape, work, tokens)
        in_backward = max(shape.layers * layer + _head_gradient(shape, work), layer + gradients) + passing
    # The embeddings come last. Whole weights take their gradients where they are kept; of shared ones the embeddings'
    # is made beside that of the head, which may be the same.
    beside = work.rank is None and shards > 1
    at_embeddings = gradients + (_FLOAT32 * shape.vocabulary * shape.width if beside else 0)
    accumulates = work.step_tokens > tokens * processes
    if accumulates:
        # Those of the micro-batches before are there all the time.
        in_step = gradients + max(at_head, in_backward)
    else:
        in_step = max(at_head, in_backward + (gradients if checkpointing else 0))
    in_step = max(in_step, at_embeddings)
    return held + logits + whole_unit + max(in_step, _evaluating(shape, work, kind) if work.evaluates else 0)


def choose(shape: Shape, work: Work, devices: Devices, parallelism: Parallelism | None = None) -> Layout:
    """The first that fits, the fastest first: whole copies before shards, saved activations before recomputed ones,
    large micro-batches before small ones. `parallelism` settles the first question. Raises Failure(user, JOB_TOO_LARGE)
    with the numbers when nothing fits."""
    usable = int(devices.memory_bytes * USABLE_SHARE)
    smallest = 0
    for division, shards in _divisions(devices.count, parallelism):
        for checkpointing in (False, True):
            for tokens in _micro_batches(work):
                needed = peak_bytes(
                    shape,
                    work,
                    kind=devices.kind,
                    micro_batch_tokens=tokens,
                    checkpointing=checkpointing,
                    processes=devices.count,
                    shards=shards,
                )
                smallest = min(smallest or needed, needed)
                if needed <= usable:
                    return Layout(
                        processes=devices.count,
                        parallelism=division,
                        micro_batch_tokens=tokens,
                        accumulation=max(1, -(-work.step_tokens // (tokens * devices.count))),
                        activation_checkpointing=checkpointing,
                        peak_bytes=needed,
                    )
    raise _too_large(shape, work, devices, smallest)


def _divisions(count: int, asked: Parallelism | None) -> list[tuple[Parallelism, int]]:
    divisions: list[tuple[Parallelism, int]] = [("replicated", 1)]
    if count > 1:
        divisions.append(("sharded", count))
    return [division for division in divisions if asked in (None, division[0])]


def _micro_batches(work: Work) -> list[int]:
    """The setting and its halves, down to one longest row."""
    sizes = [work.micro_batch_tokens]
    while sizes[-1] // 2 >= max(work.sequence_tokens, MICRO_BATCH_TOKENS_MIN):
        sizes.append(sizes[-1] // 2)
    shortest = max(work.sequence_tokens, MICRO_BATCH_TOKENS_MIN)
    return sizes if shortest >= sizes[-1] else [*sizes, shortest]


def _weight_bytes(work: Work, kind: Kind) -> int:
    return _BFLOAT16 if kind == "cuda" and work.rank is not None else _FLOAT32


def _trainable(shape: Shape, work: Work) -> int:
    return shape.parameters if work.rank is None else shape.adapter_parameters(work.rank)


def _weights(shape: Shape, work: Work, kind: Kind) -> int:
    # No copy for the reference of preferences: that is the base with its adapter off, or numbers that were computed
    # before.
    adapter = 0 if work.rank is None else _FLOAT32 * shape.adapter_parameters(work.rank)
    return shape.parameters * _weight_bytes(work, kind) + adapter


def _copies(shape: Shape, work: Work, kind: Kind, shards: int) -> int:
    """Full weights on CUDA that are not shared out are multiplied in 16 bits, and the backward pass wants the same
    numbers."""
    return _BFLOAT16 * shape.parameters if kind == "cuda" and work.rank is None and shards == 1 else 0


def _moments(shape: Shape, work: Work) -> int:
    return _MOMENTS * _FLOAT32 * _trainable(shape, work)


def _layer_elements(shape: Shape, work: Work, tokens: int) -> int:
    """What one layer saves: two norms with their inputs; query, key and value; the attention's answer; and of the MLP
    gate, activation, up and their product. An adapter adds its narrow activations. An adapter of fused experts also
    adds all of their weights, because peft adds itself to them before they are multiplied."""
    mlp = 4 * shape.mlp_width * shape.experts_per_token + _expert_copies(shape)
    attention = 2 * shape.query_width + 2 * shape.key_value_width
    adapters = 0 if work.rank is None else 7 * work.rank
    adapted = 0 if work.rank is None or shape.experts == 1 else 3 * shape.experts * shape.width * shape.mlp_width
    return tokens * (4 * shape.width + attention + mlp + adapters) + adapted


def _pairs(work: Work, tokens: int) -> int:
    """Of tokens that stand in one line of a micro-batch."""
    return tokens * min(work.scored_line_tokens, tokens)


def _scores(shape: Shape, work: Work, tokens: int, width: int) -> int:
    """Bytes that eager attention saves in a layer: the softmax, always in float32, its copy in 16 bits, and the capped
    scores."""
    each = _FLOAT32 + (width if width != _FLOAT32 else 0) + (width if work.capped_scores else 0)
    return _pairs(work, tokens) * shape.heads * each


def _passing_scores(shape: Shape, work: Work, tokens: int) -> int:
    """The scores on their way to the softmax, or their gradient on the way back."""
    return 2 * _FLOAT32 * _pairs(work, tokens) * shape.heads


def _expert_copies(shape: Shape) -> int:
    """Per token: each of its experts takes a copy of the inputs, and its answer is kept until it is weighed."""
    return 2 * shape.width * shape.experts_per_token if shape.experts > 1 else 0


def _logits(shape: Shape, work: Work, tokens: int, kind: Kind) -> int:
    """The buffer that one chunk after another goes through. It stays allocated."""
    return min(work.head_rows, tokens) * shape.vocabulary * _FLOAT32 * LOGITS_COPIES[kind]


def _head(shape: Shape, work: Work, tokens: int) -> int:
    """The hidden states with their gradient, and the gradient of the head itself when it is trained."""
    return 2 * tokens * shape.width * _FLOAT32 + _head_gradient(shape, work)


def _head_gradient(shape: Shape, work: Work) -> int:
    return shape.vocabulary * shape.width * _FLOAT32 if work.rank is None else 0


def _evaluating(shape: Shape, work: Work, kind: Kind) -> int:
    """An evaluation keeps nothing for a backward pass: one layer at a time, then the head's chunk. Its micro-batches
    keep the size that was set, so that an evaluation gives the same result on any device."""
    tokens = max(work.micro_batch_tokens, work.sequence_tokens)
    width = _weight_bytes(work, kind)
    layer = _layer_elements(shape, work, tokens) * width + _scores(shape, work, tokens, width)
    return max(layer + _passing_scores(shape, work, tokens), _head(shape, work, tokens))


def _too_large(shape: Shape, work: Work, devices: Devices, needed: int) -> Failure:
    trains = "all weights" if work.rank is None else f"an adapter of rank {work.rank}"
    usable = int(devices.memory_bytes * USABLE_SHARE)
    advice = "lower max_seq_length, train an adapter instead of all weights, or ask for more or larger devices"
    return user_failure(
        "JOB_TOO_LARGE",
        f"training {trains} of a model with {shape.parameters / 1e6:.1f} million weights on rows of "
        f"{work.sequence_tokens} tokens "
        f"needs at least {_gib(needed)} on each of {devices.count} devices, where {_gib(usable)} of "
        f"{_gib(devices.memory_bytes)} "
        f"can be used; {advice}",
        [Violation(field="max_seq_length", description=advice)],
        {"needed_bytes": str(needed), "available_bytes": str(usable), "devices": str(devices.count)},
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
