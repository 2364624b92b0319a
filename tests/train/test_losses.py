"""The arithmetic: chunked against plain, packed against alone, and the whole loop against a few lines of bare transformers."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from services.trainer.train import loss as loss_module
from services.trainer.train.batches import IGNORED, micro_batches
from services.trainer.train.inputs import prepare_inputs
from services.trainer.train.loop import train
from services.trainer.train.loss import cross_entropy_sum, log_probs
from services.trainer.train.model import load_base
from services.trainer.train.optim import learning_rate_at
from services.trainer.train.spec import Schedule, load_spec, resolve_paths

FAMILIES = ("tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-mistral", "tiny-mixtral", "tiny-gemma")
GOLDEN = Path(__file__).parents[1] / "assets" / "losses" / "tiny-llama-lora.json"


def inputs_of(workdir: Path) -> Any:
    return prepare_inputs(resolve_paths(load_spec(workdir / "spec.json"), workdir), workdir, lambda *_, **__: None)


def run_in_process(workdir: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
    train(spec, workdir, lambda kind, **fields: events.append({"type": kind, **fields}), lambda: False)
    return events


def trace(events: list[dict[str, Any]]) -> list[float]:
    return [step["loss"] for event in events if event["type"] == "progress" for step in event["steps"]]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_chunked_cross_entropy_is_the_plain_one_with_its_gradients(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", 7)
    torch.manual_seed(0)
    hidden = torch.randn(33, 8, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(0, 50, (33,))
    logits = hidden @ weight.T
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    plain = functional.cross_entropy(capped, labels, reduction="sum")
    expected = torch.autograd.grad(3.0 * plain, [hidden, weight])
    ours = cross_entropy_sum(hidden, weight, labels, softcap)
    found = torch.autograd.grad(3.0 * ours, [hidden, weight])
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(-log_probs(hidden, weight, labels, softcap).sum(), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_packed_or_padded_together_score_as_alone(
    family: str, make_job: Callable[..., Path], base_model: Callable[[str], Path]
) -> None:
    """No attention, no position and no target leaks from row to row: per-token log-probabilities agree."""
    rows = inputs_of(make_job(model=family)).train.rows
    model = load_base(base_model(family), "cpu", full=True)
    model.module.eval()

    def per_row(tokens_max: int, layout: Any) -> dict[int, Any]:
        scores: dict[int, Any] = {}
        for batch in micro_batches(rows, range(rows.count), tokens_max=tokens_max, layout=layout, device="cpu"):
            with torch.no_grad():
                hidden, targets = model.labelled_hidden(batch)
                values = log_probs(hidden, model.head_weight, targets, model.softcap)
            lengths = [int(rows.row(row)[1].sum()) for row in batch.rows]
            scores |= dict(zip(batch.rows, values.split(lengths), strict=True))
        return scores

    alone = per_row(1, "padded")
    assert sorted(alone) == list(range(rows.count))
    for layout in ("padded", "packed"):
        together = per_row(512, layout)
        worst = max((alone[row] - together[row]).abs().max().item() for row in alone)
        assert worst < 5e-5, (layout, worst)


def test_the_loop_is_a_few_lines_of_bare_transformers(make_job: Callable[..., Path], base_model: Any) -> None:
    """Full weights, no dropout: the same rows through transformers' own loss, torch's AdamW and transformers' schedule."""
    workdir = make_job(training={"type": "full"}, evaluations=0, learning_rate=1e-3, max_grad_norm=0.5)
    inputs = inputs_of(workdir)
    ours = trace(run_in_process(workdir))

    model = AutoModelForCausalLM.from_pretrained(base_model("tiny-llama"), dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    total = inputs.plan.total_steps
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(total * 0.1), total)
    theirs = []
    for step in range(total):
        rows = [inputs.train.rows.row(row) for row in inputs.plan.sequences_of_step(step, inputs.train.rows.count)]
        width = max(len(ids) for ids, _ in rows)
        input_ids = torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for line, (ids, labelled) in enumerate(rows):
            input_ids[line, : len(ids)] = torch.from_numpy(ids)
            labels[line, : len(ids)] = torch.where(torch.from_numpy(labelled), torch.from_numpy(ids).long(), IGNORED)
            mask[line, : len(ids)] = 1
        loss = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    assert len(ours) == total
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-5


def test_accumulation_and_micro_batches_change_nothing_but_the_last_bits(make_job: Callable[..., Path]) -> None:
    plain = {"training": {"type": "lora", "r": 4, "dropout": 0.0}, "evaluations": 0}
    whole = trace(run_in_process(make_job("a", **plain)))
    split = trace(
        run_in_process(make_job("b", **plain, batch_size=2, gradient_accumulation_steps=2, micro_batch_tokens=64))
    )
    assert max(abs(a - b) for a, b in zip(whole, split, strict=True)) < 1e-5


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_schedule_is_that_of_transformers(kind: Any) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    make: Any = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}[kind]
    theirs = make(optimizer, 5, 50)
    settings = Schedule(type=kind, min_lr_ratio=0.0, num_cycles=0.5)
    for step in range(50):
        assert learning_rate_at(step, 50, 0.1, 0.1, settings) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_the_schedule_ends_at_its_floor_and_counts_cycles() -> None:
    floor = Schedule(type="linear", min_lr_ratio=0.25, num_cycles=0.5)
    assert learning_rate_at(0, 10, 1.0, 0.0, floor) == 1.0
    assert learning_rate_at(10, 10, 1.0, 0.0, floor) == 0.25
    twice = Schedule(type="cosine", min_lr_ratio=0.0, num_cycles=1.5)
    assert learning_rate_at(4, 12, 1.0, 0.0, twice) == pytest.approx(0.0)
    assert learning_rate_at(8, 12, 1.0, 0.0, twice) == pytest.approx(1.0)


def test_the_template_is_rendered_and_tokenised_as_transformers_does(
    make_job: Callable[..., Path], base_model: Any
) -> None:
    workdir = make_job()
    rows = inputs_of(workdir).train.rows
    tokenizer = AutoTokenizer.from_pretrained(base_model("tiny-llama"))
    lines = (workdir / "inputs" / "train.jsonl").read_text().splitlines()
    for index, line in enumerate(lines):
        expected = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=True, return_dict=False)
        assert rows.row(index)[0].tolist() == expected


def test_losses_are_the_recorded_ones(make_job: Callable[..., Path]) -> None:
    """A change of arithmetic, order, mask or schedule shows here. The tolerance is for other processors; to record anew on
    purpose, write the trace of this job to the file."""
    golden = json.loads(GOLDEN.read_text())
    events = run_in_process(make_job())
    assert trace(events) == pytest.approx(golden["train"], abs=2e-3)
    assert [e["loss"] for e in events if e["type"] == "evaluation"] == pytest.approx(golden["validation"], abs=2e-3)
