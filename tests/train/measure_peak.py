"""Measures, in a process of its own, the most bytes of tensors that one training step holds: torch's profiler counts
every allocation and release of the CPU allocator. Prints them, a line for each request, beside the planner's
prediction.

`python -m tests.train.measure_peak '[{"shape": "12m", "rank": 16, "length": 256, "lines": 8, "checkpointing": false}]'`
"""

import json
import sys
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from services.trainer.train.data.batches.micro_batch import MicroBatch
from services.trainer.train.losses import cross_entropy
from services.trainer.train.losses.cross_entropy import CHUNK_ROWS
from services.trainer.train.losses.objective import Supervised
from services.trainer.train.memory.memory_planner import Work, peak_bytes, shape_of
from services.trainer.train.modeling.attention import caps_scores, plain_attention
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.modeling.in_place_gradients import keep_gradients_in_place
from services.trainer.train.modeling.lora import add_adapter
from services.trainer.train.modeling.optimizer import clip_gradients, make_optimizer
from services.trainer.train.settings.spec import LoraTraining
from tests.train.full_lines import full_lines

# About 1, 12 and 30 million weights; the latter two have the vocabulary of a real tokenizer. The mixtures are as small,
# the experts of one as wide as its intermediate_size and those of the other by far narrower.
SHAPES: dict[str, dict[str, Any]] = {
    "1m": {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4},
    "12m": {"vocab_size": 32_000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4},
    "30m": {"vocab_size": 32_000, "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 10},
    "mixtral": {
        "model_type": "mixtral", "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 4, "num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False,
    },
    "tiny-mixtral": {
        "model_type": "mixtral", "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 192,
        "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe", "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "tie_word_embeddings": False,
    },
    # Eager attention; a short vocabulary, so that its scores are what counts.
    "gemma2": {
        "model_type": "gemma2", "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 4, "sliding_window": 64, "attn_logit_softcapping": 50.0,
    },
}  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    width = SHAPES[name]["hidden_size"]
    return {
        "model_type": "llama",
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 64,
        "head_dim": 32,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
        **SHAPES[name],
    }


def measure(request: dict[str, Any]) -> dict[str, int]:
    """All tokens are labelled, which is the most that a head can have to do."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # Those of a larger request before stay otherwise.
    cross_entropy._buffers.clear()
    config = config_of(request["shape"])
    made = AutoConfig.for_model(**config)
    attention = plain_attention(made)
    base = AutoModelForCausalLM.from_config(made, attn_implementation=attention)
    model = CausalModel(module=base, base=base, device="cpu", softcap=None)
    rank = request["rank"]
    if rank is not None:
        training = LoraTraining(r=rank, alpha=2 * rank, dropout=0.0, target_modules="all-linear")
        model = add_adapter(model, training, "base")
    else:
        keep_gradients_in_place(base, linear=True)
        model = replace(model, in_place=True)
    if request["checkpointing"]:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(model.trainable, 0.0)
    model.module.train()
    lines, length = request["lines"], request["length"]
    batch = _batch(lines, length, config["vocab_size"])
    _step(model, optimizer, batch)
    tensors = [
        *cross_entropy._buffers.values(),
        *base.parameters(),
        *(tensor for state in optimizer.state.values() for tensor in state.values()),
    ]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _step(model, optimizer, batch)
    work = Work(
        rank=rank,
        sequence_tokens=length,
        step_tokens=lines * length,
        micro_batch_tokens=lines * length,
        head_rows=CHUNK_ROWS,
        scored_line_tokens=length if attention == "eager" else 0,
        capped_scores=caps_scores(made),
    )
    predicted = peak_bytes(
        shape_of(config),
        work,
        kind="cpu",
        micro_batch_tokens=lines * length,
        checkpointing=request["checkpointing"],
    )
    return {"measured": held + _most(profiler), "predicted": predicted, "held": held}


def _batch(lines: int, length: int, vocabulary: int) -> MicroBatch:
    return full_lines(torch.randint(0, vocabulary, (lines, length)))


def _step(model: CausalModel, optimizer: Any, batch: MicroBatch) -> None:
    Supervised().loss_sum(model, batch, 1 / batch.labelled).backward()
    clip_gradients(model.trainable.values(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _most(profiler: Any) -> int:
    held = most = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


if __name__ == "__main__":
    for request in json.loads(sys.argv[1]):
        print(json.dumps(request | measure(request)), flush=True)
