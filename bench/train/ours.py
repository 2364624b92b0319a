"""Our side: the engine as the agent starts it, from a spec and a file of rows to the exported artefact.

The clock runs from `started` to the last progress report: the model is loaded and the rows are tokenised before, as on
every side. The loss is that of the exported files, loaded by plain transformers and peft.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from services.trainer.train.main import ENVIRONMENT

# Before torch is imported: the engine's own choices, exactness included.
os.environ.update(ENVIRONMENT)

from peft import PeftModel

from bench.train.bench_rows import (
    require_same_tokens,
    rows_of,
    tokens_in,
    training_pairs,
    training_rows,
    write_pairs,
    write_rows,
)
from bench.train.judge import held_out_loss
from bench.train.plain import load_module
from bench.train.run_clock import Clock
from bench.train.shapes import (
    DPO_BETA,
    GRADIENT_NORM_MAX,
    LEARNING_RATE,
    LORA_ALPHA,
    LORA_RANK,
    PER_STEP,
    SEED,
    SHAPES,
    THREADS,
)
from services.trainer.train.loop.run import train
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import parse_spec


class Watch:
    """Hears the run's events. Export and proof come after the last report: the other sides do neither."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.started: dict[str, Any] = {}

    def __call__(self, event_type: str, /, **fields: Any) -> None:
        if event_type == "started":
            self.started = fields
            self.clock.start()
        elif event_type == "progress":
            self.clock.finish()


def run(task: dict[str, Any]) -> dict[str, Any]:
    shape, method, workdir = SHAPES[task["shape"]], task["method"], Path(task["workdir"])
    workdir.mkdir(parents=True)
    if method == "dpo":
        pairs = training_pairs(shape, task["examples"])
        rows = rows_of(pairs)
        write_pairs(pairs, workdir / "train.jsonl")
    else:
        rows = training_rows(shape, task["examples"])
        write_rows(rows, workdir / "train.jsonl")
    watch = Watch()
    spec = parse_spec(spec_document(method, task["base"]) | task.get("settings", {}))
    train(resolve_paths(spec, workdir), workdir, watch, lambda: False)
    require_same_tokens(
        "the engine",
        rows,
        tokens=watch.started["train_token_count"],
        labels=watch.started["trained_token_count"],
    )
    export = str(workdir / "export")
    module = load_module(export) if method == "full" else PeftModel.from_pretrained(load_module(task["base"]), export)
    return watch.clock.result() | {"tokens": tokens_in(rows), "loss": held_out_loss(module, shape, method)}


def spec_document(method: str, base: str) -> dict[str, Any]:
    lora = {"type": "lora", "r": LORA_RANK, "alpha": LORA_ALPHA}
    document = {
        "job_id": "ft-bench",
        "training": {"type": "full"} if method == "full" else lora,
        "base_model": {"directory": base, "id": "bench", "revision": "rv_bench"},
        "train_file": "train.jsonl",
        "batch_size": PER_STEP[method],
        "packing": False,
        "learning_rate": LEARNING_RATE[method],
        "max_grad_norm": GRADIENT_NORM_MAX,
        "checkpoint_every_steps": 1_000_000,
        "threads": THREADS,
        "seed": SEED,
        "parity_rows": 1,
    }
    return document | ({"method": "dpo", "dpo": {"beta": DPO_BETA}} if method == "dpo" else {})
