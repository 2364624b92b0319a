"""A plain loop of our own: bare transformers and peft, rows of a step in buckets of like length, full logits. It is
what the engine's own loss and layout are measured against, and it makes the base models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from bench.train.bench_rows import BEGIN_ID, END_ID, IGNORED, PAD_ID, Row, tokens_in, training_rows, write_tokenizer
from bench.train.buckets import buckets
from bench.train.judge import held_out_loss
from bench.train.run_clock import Clock
from bench.train.shapes import (
    CONTEXT_LENGTH,
    GRADIENT_NORM_MAX,
    LEARNING_RATE,
    LORA_ALPHA,
    LORA_RANK,
    PER_STEP,
    SEED,
    SHAPES,
    THREADS,
    Shape,
)


def run(task: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(THREADS)
    shape = SHAPES[task["shape"]]
    if task.get("make"):
        make_base(shape, Path(task["base"]))
        return {"loss": held_out_loss(load_module(task["base"]), shape, "lora")}
    rows = training_rows(shape, task["examples"])
    module = load_module(task["base"])
    if task["method"] == "lora":
        module = with_adapter(module)
    clock = Clock()
    clock.start()
    train(module, rows, task["method"])
    clock.finish()
    return clock.result() | {
        "tokens": tokens_in(rows),
        "loss": held_out_loss(module, shape, task["method"]),
    }


def train(module: Any, rows: list[Row], method: str) -> None:
    """One epoch, a cosine down to zero."""
    parameters = [value for value in module.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE[method], weight_decay=0.0, fused=True)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED)).tolist()
    steps = [order[start : start + PER_STEP[method]] for start in range(0, len(order), PER_STEP[method])]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    module.train()
    for step in steps:
        chosen = [rows[index] for index in step]
        labelled = sum(label != IGNORED for row in chosen for label in row.labels[1:])
        for bucket in buckets(chosen):
            input_ids, labels = pad(bucket)
            logits = module(input_ids=input_ids, use_cache=False).logits[:, :-1]
            loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            (loss / labelled).backward()
        torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM_MAX)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def pad(rows: list[Row]) -> tuple[Any, Any]:
    """No mask: a causal model sees no pad behind its tokens."""
    width = max(len(row.ids) for row in rows)
    ids = [row.ids + [PAD_ID] * (width - len(row.ids)) for row in rows]
    labels = [row.labels + [IGNORED] * (width - len(row.labels)) for row in rows]
    return torch.tensor(ids), torch.tensor(labels)


def load_module(base: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )


def with_adapter(module: Any) -> Any:
    torch.manual_seed(SEED)
    return get_peft_model(module, lora_config())


def lora_config() -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM", r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", bias="none"
    )


def make_base(shape: Shape, folder: Path) -> None:
    """Random weights."""
    torch.manual_seed(SEED)
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=shape.vocabulary,
        pad_token_id=PAD_ID,
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
        **shape.config,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(str(folder))
    write_tokenizer(shape.vocabulary, CONTEXT_LENGTH, folder)
