"""The engine against a loop of a few lines with bare transformers, peft and torch on the same rows: the same losses.

The reference shares with the engine which rows a step has, and nothing else: it pads them as everybody does, masks the
pads, makes all logits, and takes transformers' schedules and torch's AdamW.
"""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from services.trainer.train.data.run_inputs import Inputs, prepare_inputs
from services.trainer.train.loop.run import train
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import load_spec
from tests.train.conftest import preferences, write_rows

# Float32 on both sides; the rows of a micro-batch are laid out otherwise, so sums round otherwise.
LOSS_TOLERANCE = 1e-5
STEPS = 12
FULL = {"type": "full"}
LORA = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.0}
# 24 rows, 10 a step: the last step of each of 4 epochs has 4, which are 2 of 5 accumulations.
SETTINGS: dict[str, Any] = {
    "epochs": 4, "evaluations": 0, "validation_file": None, "batch_size": 2, "gradient_accumulation_steps": 5,
    "packing": False, "max_grad_norm": 0.5, "weight_decay": 0.1, "warmup_ratio": 0.2,
}  # fmt: skip
# Rows of at most 96 tokens packed to 13 sequences, 5 a step: the last step of each epoch has 3.
PACKED = {"packing": True, "max_seq_length": 96, "batch_size": 1}
DPO: dict[str, Any] = {"method": "dpo", "dpo": {"beta": 0.3}}

CASES: dict[str, dict[str, Any]] = {
    "full": {"training": FULL, "schedule": {"type": "cosine"}},
    "lora": {"training": LORA, "schedule": {"type": "linear"}},
    "full-packed": {"training": FULL, **PACKED},
    "lora-packed": {"training": LORA, **PACKED},
    "full-weights": {"training": FULL, "weighted": True},
    "lora-weights-packed": {"training": LORA, "weighted": True, **PACKED},
    "full-dpo": {"training": FULL, **DPO},
    "lora-dpo": {"training": LORA, **DPO},
    "lora-dpo-by-length": {
        "training": LORA, "method": "dpo",
        "dpo": {"beta": 0.3, "normalize_logratios_by_length": True, "rpo_alpha": 0.5},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "case"),
    [*(("tiny-llama", case) for case in CASES), ("tiny-qwen3", "full"), ("tiny-qwen3", "lora-packed")],
)
def test_the_loop_is_a_few_lines_of_bare_transformers(model: str, case: str, make_job: Callable[..., Path]) -> None:
    """Accumulation, its partial last group, clipping, weight decay, warm-up and schedule included."""
    settings = {**SETTINGS, **CASES[case]}
    weighted = settings.pop("weighted", False)
    rate = 1e-3 if settings["training"] == FULL else 5e-3
    workdir = make_job(model=model, learning_rate=rate, **settings)
    train_file = workdir / "inputs" / "train.jsonl"
    if settings.get("method") == "dpo":
        write_rows(train_file, preferences(24))
    if weighted:
        rows = [json.loads(line) for line in train_file.read_text().splitlines()]
        write_rows(train_file, [{**row, "weight": 0.25 + number % 7 / 2} for number, row in enumerate(rows)])
    ours = engine_losses(workdir)
    theirs = reference_losses(workdir)
    assert len(ours) == len(theirs) == STEPS
    assert ours[-1] < ours[0] - 0.1
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < LOSS_TOLERANCE


def engine_losses(workdir: Path) -> list[float]:
    losses: list[float] = []

    def hear(kind: str, /, **fields: Any) -> None:
        if kind == "progress":
            losses.extend(step["loss"] for step in fields["steps"])

    train(resolve_paths(load_spec(workdir / "spec.json"), workdir), workdir, hear, lambda: False)
    return losses


def reference_losses(workdir: Path) -> list[float]:
    settings = json.loads((workdir / "spec.json").read_text())
    inputs = prepare_inputs(resolve_paths(load_spec(workdir / "spec.json"), workdir), workdir, lambda *_, **__: None)
    torch.manual_seed(settings["seed"])
    model = AutoModelForCausalLM.from_pretrained(settings["base_model"]["directory"], dtype=torch.float32)
    base = copy.deepcopy(model)
    if settings["training"]["type"] == "lora":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": 0.1},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings["learning_rate"])
    total = inputs.schedule.total_steps
    schedule_of: Any = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}
    kind = settings.get("schedule", {"type": "cosine"})["type"]
    schedule = schedule_of[kind](optimizer, math.ceil(total * settings["warmup_ratio"]), total)
    losses = []
    for step in range(total):
        sequences = inputs.schedule.sequences_of_step(step, inputs.train.sequences.count).tolist()
        size = settings["batch_size"]
        loss_of_step = 0.0
        for start in range(0, len(sequences), size):
            loss = _loss(model, base, inputs, sequences, sequences[start : start + size])
            loss.backward()
            loss_of_step += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, settings["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss_of_step)
    return losses


def _loss(model: Any, base: Any, inputs: Inputs, of_step: list[int], of_batch: list[int]) -> Any:
    """What a batch adds to the loss of its step, which is a mean over all labelled tokens, or pairs, of the step."""
    rows, groups = inputs.train.rows, inputs.train.sequences.groups
    indices = [row for sequence in of_batch for row in groups[sequence]]
    batch = padded([rows.row(index) for index in indices])
    if inputs.spec.method_settings is not None:
        return _preference_loss(model, base, batch, inputs.spec.method_settings) / len(of_step)
    labelled = sum(int(rows.row(row)[1].sum()) for sequence in of_step for row in groups[sequence])
    if rows.weights is None:
        return model(**batch, num_items_in_batch=labelled).loss
    weights = torch.from_numpy(rows.weights[indices])
    return -(_log_probs(model, batch).sum(dim=1) * weights).sum() / labelled


def _preference_loss(model: Any, base: Any, batch: dict[str, Any], dpo: Any) -> Any:
    """Preferred answers lie before the others: -log sigmoid(beta * ((p - ref p) - (q - ref q))) - alpha * p / tokens of
    p."""
    policy = _log_probs(model, batch).sum(dim=1)
    with torch.no_grad():
        reference = _log_probs(base, batch).sum(dim=1)
    lengths = (batch["labels"] != -100).sum(dim=1)
    ratios = policy - reference
    if dpo.normalize_logratios_by_length:
        ratios = ratios / lengths
    losses = -functional.logsigmoid(dpo.beta * (ratios[::2] - ratios[1::2]))
    return (losses - dpo.rpo_alpha * policy[::2] / lengths[::2]).sum()


def _log_probs(model: Any, batch: dict[str, Any]) -> Any:
    """[lines, length - 1], 0 where nothing is labelled."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    scores = torch.log_softmax(logits[:, :-1], dim=-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
    return scores * (labels != -100)


def padded(rows: list[Any]) -> dict[str, torch.Tensor]:
    width = max(len(ids) for ids, _ in rows)
    batch = {
        name: torch.zeros(len(rows), width, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")
    }
    batch["labels"] -= 100
    for line, (ids, marks) in enumerate(rows):
        tokens = torch.from_numpy(ids).long()
        batch["input_ids"][line, : len(ids)] = tokens
        batch["attention_mask"][line, : len(ids)] = 1
        batch["labels"][line, : len(ids)] = torch.where(torch.from_numpy(marks), tokens, -100)
    return batch
