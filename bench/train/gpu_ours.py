"""Our side on a GPU: the engine's own start and steps, without export and proof. It also makes the base model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from services.trainer.train.main import ENVIRONMENT

# Before torch is imported: the engine's own choices, exactness included.
os.environ.update(ENVIRONMENT)

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.train.bench_rows import BEGIN_ID, END_ID, PAD_ID, gpu_rows, write_rows, write_tokenizer
from bench.train.gpu_clock import DeviceClock, device_name
from bench.train.gpu_shapes import GPU_SHAPES, LEARNING_RATE, OUR_SETTINGS, WARM_STEPS, GpuShape
from bench.train.shapes import GRADIENT_NORM_MAX, LORA_ALPHA, LORA_RANK, SEED, THREADS
from services.trainer.train.data.run_inputs import prepare_inputs
from services.trainer.train.loop.start_run import set_up_torch, start_run
from services.trainer.train.loop.step import settle_step, train_step
from services.trainer.train.memory.fit import fit_to_devices
from services.trainer.train.runtime.process_group import ALONE
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import parse_spec


class Heard:
    """The steps that a run reported."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def __call__(self, _event_type: str, /, **fields: Any) -> None:
        self.steps += fields.get("steps", ())


def run(task: dict[str, Any]) -> dict[str, Any]:
    shape, device = GPU_SHAPES[task["shape"]], task["device"]
    if task.get("make"):
        return make_base(shape, Path(task["base"]), device)
    length, setting, workdir = task["length"], OUR_SETTINGS[task["setting"]], Path(task["workdir"])
    workdir.mkdir(parents=True)
    write_rows(gpu_rows(shape, length), workdir / "train.jsonl")
    document = {
        "job_id": "ft-bench",
        "training": {"type": "lora", "r": LORA_RANK, "alpha": LORA_ALPHA},
        "base_model": {"directory": task["base"], "id": "bench", "revision": "rv_bench"},
        "train_file": "train.jsonl",
        "max_seq_length": length,
        "batch_size": shape.sequences_per_step(length),
        "packing": True,
        "learning_rate": LEARNING_RATE,
        "max_grad_norm": GRADIENT_NORM_MAX,
        "device": device,
        "threads": THREADS,
        "micro_batch_tokens": length * setting.batch_size,
        "activation_checkpointing": setting.recomputes,
        "seed": SEED,
    }
    spec = resolve_paths(parse_spec(document), workdir)
    set_up_torch(spec)
    inputs = prepare_inputs(spec, workdir, Heard())
    heard = Heard()
    work = start_run(inputs, heard, lambda: False, layout=fit_to_devices(inputs, ALONE))
    steps = WARM_STEPS + shape.timed_steps
    if inputs.schedule.total_steps < steps:
        raise ValueError(f"the rows make {inputs.schedule.total_steps} steps and {steps} are wanted")
    clock, began = DeviceClock(device), 0
    for step in range(steps):
        if step == WARM_STEPS:
            settle_step(work)
            clock.start()
            began = work.position.metered_train_tokens
        train_step(work, step)
    settle_step(work)
    clock.finish()
    work.progress.flush(work.position, partial=True)
    losses = [step["loss"] for step in heard.steps[WARM_STEPS:]]
    return {
        "tokens": work.position.metered_train_tokens - began,
        "seconds": clock.seconds,
        "peak_bytes": clock.peak_bytes(),
        "loss": sum(losses) / len(losses),
    }


def make_base(shape: GpuShape, folder: Path, device: str) -> dict[str, Any]:
    """Random weights, in bf16 as published ones are."""
    folder.mkdir(parents=True)
    torch.manual_seed(SEED)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context_length,
        pad_token_id=PAD_ID,
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
        **shape.config,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(str(folder))
    write_tokenizer(shape.vocabulary, shape.context_length, folder)
    return {"weights": sum(value.numel() for value in model.parameters()), "device": device_name(device)}
