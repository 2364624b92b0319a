"""TRL's SFTTrainer on a GPU: packed sequences of the same rows, its own kernels and its loss in chunks."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from bench.train.bench_rows import gpu_rows
from bench.train.gpu_clock import DeviceClock
from bench.train.gpu_shapes import GPU_SHAPES, GPU_TRL_SETTINGS, LEARNING_RATE, WARM_STEPS
from bench.train.plain import lora_config
from bench.train.shapes import GRADIENT_NORM_MAX, SEED, THREADS


class Watch(TrainerCallback):
    def __init__(self, clock: DeviceClock, last_step: int) -> None:
        self._clock = clock
        self._last_step = last_step
        self.trainer: SFTTrainer | None = None
        self.tokens = 0

    def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        assert self.trainer is not None
        # Real tokens that its loss has seen, as it logs them under num_tokens.
        if state.global_step == WARM_STEPS:
            self._clock.start()
            self.tokens = -self.trainer._total_train_tokens
        elif state.global_step == self._last_step:
            self._clock.finish()
            self.tokens += self.trainer._total_train_tokens


def run(task: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(THREADS)
    shape, device, length = GPU_SHAPES[task["shape"]], task["device"], task["length"]
    setting = GPU_TRL_SETTINGS[task["setting"]]
    on_cpu = device == "cpu"
    module = AutoModelForCausalLM.from_pretrained(
        task["base"],
        dtype=torch.float32 if on_cpu else torch.bfloat16,
        attn_implementation=setting.attention,
        local_files_only=True,
    )
    torch.manual_seed(SEED)
    clock, last_step = DeviceClock(device), WARM_STEPS + shape.timed_steps
    watch = Watch(clock, last_step)
    rows = gpu_rows(shape, length)
    trainer = SFTTrainer(
        model=get_peft_model(module, lora_config()),
        args=SFTConfig(
            output_dir=task["workdir"],
            per_device_train_batch_size=setting.batch_size,
            gradient_accumulation_steps=shape.sequences_per_step(length) // setting.batch_size,
            max_steps=last_step,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            max_grad_norm=GRADIENT_NORM_MAX,
            optim="adamw_torch_fused",
            weight_decay=0.0,
            max_length=length,
            packing=True,
            gradient_checkpointing=setting.recomputes,
            use_liger_kernel=setting.liger,
            bf16=not on_cpu,
            use_cpu=on_cpu,
            seed=SEED,
            logging_steps=1,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(
            {"input_ids": [row.ids for row in rows], "labels": [row.labels for row in rows]}
        ),
        processing_class=AutoTokenizer.from_pretrained(task["base"], local_files_only=True),
        callbacks=[watch],
    )
    watch.trainer = trainer
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][WARM_STEPS:]
    return {
        "tokens": watch.tokens,
        "seconds": clock.seconds,
        "peak_bytes": clock.peak_bytes(),
        "loss": sum(map(float, losses)) / len(losses),
    }
