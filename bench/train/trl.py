"""The other side: TRL's SFTTrainer and DPOTrainer on the same token ids.

The clock runs from the begin of the first step to the end of the last one.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from bench.train.bench_rows import (
    END,
    Pair,
    Row,
    answer_text,
    prompt_text,
    require_same_tokens,
    rows_of,
    tokens_in,
    training_pairs,
    training_rows,
)
from bench.train.judge import held_out_loss
from bench.train.plain import load_module, lora_config, with_adapter
from bench.train.run_clock import Clock
from bench.train.shapes import (
    CONTEXT_LENGTH,
    DPO_BETA,
    GRADIENT_NORM_MAX,
    LEARNING_RATE,
    SEED,
    SHAPES,
    THREADS,
    TRL_SETTINGS,
    TrlSetting,
)


class Watch(TrainerCallback):
    def __init__(self) -> None:
        self.clock = Clock()
        self.is_running = False

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if not self.is_running:
            self.clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.finish()


def run(task: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(THREADS)
    shape, method = SHAPES[task["shape"]], task["method"]
    watch = Watch()
    if method == "dpo":
        pairs = training_pairs(shape, task["examples"])
        rows = rows_of(pairs)
        trainer = preference_trainer(task, pairs, watch)
        columns: tuple[str, ...] = ("prompt_ids", "chosen_ids", "prompt_ids", "rejected_ids")
    else:
        rows = training_rows(shape, task["examples"])
        trainer = supervised_trainer(task, rows, watch)
        columns = ("input_ids",)
    read = sum(len(ids) for column in columns for ids in trainer.train_dataset[column])
    require_same_tokens("TRL", rows, tokens=read)
    trainer.train()
    return watch.clock.result() | {"tokens": tokens_in(rows), "loss": held_out_loss(trainer.model, shape, method)}


def supervised_trainer(task: dict[str, Any], rows: list[Row], watch: Watch) -> SFTTrainer:
    setting = TRL_SETTINGS[task["method"]][task["setting"]]
    module = load_module(task["base"])
    return SFTTrainer(
        model=with_adapter(module) if task["method"] == "lora" else module,
        args=SFTConfig(packing=setting.layout == "packed", **shared_arguments(task, setting)),
        train_dataset=Dataset.from_dict(
            {"input_ids": [row.ids for row in rows], "labels": [row.labels for row in rows]}
        ),
        processing_class=AutoTokenizer.from_pretrained(task["base"], local_files_only=True),
        callbacks=[watch],
    )


def preference_trainer(task: dict[str, Any], pairs: list[Pair], watch: Watch) -> DPOTrainer:
    """A fresh adapter of the trainer's own, so that its reference is the base with the adapter off, as ours is."""
    setting = TRL_SETTINGS["dpo"][task["setting"]]
    torch.manual_seed(SEED)
    module = load_module(task["base"])
    tokenizer = AutoTokenizer.from_pretrained(task["base"], local_files_only=True)
    # What users give: text. The trainer tokenises it when it is made, before the clock.
    dataset = Dataset.from_dict(
        {
            "prompt": [prompt_text(pair.preferred) for pair in pairs],
            "chosen": [f" {answer_text(pair.preferred)} {END}" for pair in pairs],
            "rejected": [f" {answer_text(pair.other)} {END}" for pair in pairs],
            "length": [max(len(pair.preferred.ids), len(pair.other.ids)) for pair in pairs],
        }
    )
    if setting.reference_first:
        watch.clock.start()
        watch.is_running = True
    return DPOTrainer(
        model=module,
        args=DPOConfig(
            beta=DPO_BETA,
            precompute_ref_log_probs=setting.reference_first,
            remove_unused_columns=False,
            **shared_arguments(task, setting),
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora_config(),
        callbacks=[watch],
    )


def shared_arguments(task: dict[str, Any], setting: TrlSetting) -> dict[str, Any]:
    return {
        "output_dir": task["workdir"],
        "per_device_train_batch_size": setting.batch_size,
        "gradient_accumulation_steps": setting.accumulation,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE[task["method"]],
        "lr_scheduler_type": "cosine",
        "max_grad_norm": GRADIENT_NORM_MAX,
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_length": CONTEXT_LENGTH,
        "train_sampling_strategy": "group_by_length" if setting.layout == "grouped" else "random",
        "gradient_checkpointing": setting.recomputes,
        "bf16": False,
        "use_cpu": True,
        "seed": SEED,
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
