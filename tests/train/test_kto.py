"""Feedback with thumbs end to end on a tiny model: the loss by its published formula, the divergence over mismatched
rows, against a few lines of bare transformers, and exact over a kill."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.trainer.train.data.packing.mismatched import mismatched_rows
from services.trainer.train.data.run_inputs import Inputs, prepare_inputs
from services.trainer.train.losses.kto import kto_losses
from services.trainer.train.modeling.base_model import load_base
from services.trainer.train.modeling.lora import add_adapter
from services.trainer.train.modeling.trained_weights import read_trained_weights
from services.trainer.train.settings.failures import Failure
from services.trainer.train.settings.methods import Kto
from services.trainer.train.settings.spec import LoraTraining, resolve_paths
from services.trainer.train.settings.spec_json import load_spec
from tests.train.conftest import run_job, write_rows

Events = list[dict[str, Any]]


def judged(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Good answers name the second word, bad ones the first; as messages and as text."""
    words = ["river", "stone", "cloud", "ember", "meadow", "harbor"]
    rows: list[dict[str, Any]] = []
    for n in range(start, start + count):
        question, good = f"{words[n % 6]} {words[(n + 1) % 6]} number {n}", n % 3 != 0
        answer = words[(n + 1) % 6] if good else words[n % 6]
        if n % 4:
            prompt: Any = [{"role": "user", "content": question}]
            rows.append({"prompt": prompt, "completion": [{"role": "assistant", "content": answer}], "label": good})
        else:
            rows.append({"prompt": question, "completion": f" {answer}", "label": good})
    return rows


@pytest.fixture
def make_judged(make_job: Callable[..., Path]) -> Callable[..., Path]:
    """As `make_job`: 16 training and 6 validation answers, 8 steps of 4 in 2 epochs, without dropout."""

    def get(name: str = "job", **changes: Any) -> Path:
        wanted = {"method": "kto", "training": {"type": "lora", "r": 4}, "evaluations": 1, "packing": False, **changes}
        workdir = make_job(name, **wanted)
        write_rows(workdir / "inputs" / "train.jsonl", judged(16))
        write_rows(workdir / "inputs" / "held.jsonl", judged(6, start=100))
        return workdir

    return get


def of_type(events: Events, kind: str) -> Events:
    return [event for event in events if event["type"] == kind]


def trace(events: Events) -> list[float]:
    return [step["loss"] for event in of_type(events, "progress") for step in event["steps"]]


@pytest.mark.parametrize("training", [{"type": "lora", "r": 4}, {"type": "full"}], ids=["lora", "full"])
def test_two_processes_train_what_one_trains(
    make_judged: Callable[..., Path], spawn_child: Any, training: dict[str, Any]
) -> None:
    settings = {"training": training, "learning_rate": 1e-3, "threads": 1}
    told = {}
    for name, ways in {
        "one": {},
        "replicated": {"processes": 2, "parallelism": "replicated"},
        "sharded": {"processes": 2, "parallelism": "sharded"},
    }.items():
        child = spawn_child(make_judged(name, **settings, **ways))
        told[name] = [json.loads(line) for line in child.stdout]
        assert child.wait(timeout=120) == 0, told[name][-1:]
    for events in told.values():
        assert trace(events) == pytest.approx(trace(told["one"]), abs=1e-4)
        held_out, expected = (of_type(each, "evaluation")[-1] for each in (events, told["one"]))
        for name in ("loss", "reward_margin", "validation_tokens"):
            assert held_out[name] == pytest.approx(expected[name], abs=1e-4)


def inputs_of(workdir: Path) -> Inputs:
    return prepare_inputs(resolve_paths(load_spec(workdir / "spec.json"), workdir), workdir, lambda *_, **__: None)


@pytest.mark.parametrize("divergence", [0.0, 0.7])
def test_the_loss_is_the_published_one(divergence: float) -> None:
    """As TRL's KTOTrainer writes it, with loss_type `kto`: 1 - sigmoid(beta * (chosen_logratios - kl)) times the
    desirable weight, and 1 - sigmoid(beta * (kl - rejected_logratios)) times the undesirable one."""
    kto = Kto(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    ratios, good = [2.0, -3.0, 0.4, -0.2, 60.0], [True, True, False, False, False]

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = [
        kto.desirable_weight * (1 - sigmoid(kto.beta * (r - divergence)))
        if is_good
        else kto.undesirable_weight * (1 - sigmoid(kto.beta * (divergence - r)))
        for r, is_good in zip(ratios, good, strict=True)
    ]
    found = kto_losses(torch.tensor(ratios), torch.tensor(divergence), torch.tensor(good), kto)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_pulls_good_answers_up_and_bad_ones_down_and_not_the_divergence() -> None:
    ratios = torch.tensor([0.5, 0.5], requires_grad=True)
    kto_losses(ratios, torch.tensor(0.2), torch.tensor([True, False]), Kto()).sum().backward()
    assert ratios.grad is not None
    up, down = ratios.grad.tolist()
    assert up < 0 < down


def test_a_question_gets_the_answer_of_another_row_and_every_answer_is_used_once(
    make_judged: Callable[..., Path],
) -> None:
    inputs = inputs_of(make_judged())
    rows = inputs.train.rows
    mixed = mismatched_rows(rows, inputs.max_seq_length)
    assert sorted(mixed.answered_by.tolist()) == list(range(rows.count))
    assert not (mixed.answered_by == np.arange(rows.count)).any()
    for index in range(rows.count):
        ids, labelled = mixed.row(index)
        own, answer = rows.row(index), rows.row(int(mixed.answered_by[index]))
        begins = int(labelled.argmax())
        assert ids[:begins].tolist() == own[0][: int(own[1].argmax())].tolist()
        assert ids[begins:].tolist() == answer[0][int(answer[1].argmax()) :].tolist()
        assert len(ids) == mixed.lengths[index]
    short = mismatched_rows(rows, int(rows.lengths.max()) - 1)
    assert int(short.lengths.max()) <= int(rows.lengths.max()) - 1


def test_an_adapter_learns_from_thumbs_and_everything_is_told(make_judged: Callable[..., Path]) -> None:
    events = run_job(make_judged(epochs=6, learning_rate=2e-2, kto={"beta": 0.3}))
    # Before the first step the policy is its reference: every loss is half of its weight.
    assert trace(events)[0] == pytest.approx(0.5, abs=1e-5)
    before, *_, after = of_type(events, "evaluation")
    assert (before["loss"], before["reward_margin"]) == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-6))
    assert after["loss"] < 0.45
    assert after["reward_accuracy"] > 0.6
    assert after["reward_margin"] > 0
    (started,), (exported,), (finished,) = (of_type(events, kind) for kind in ("started", "exported", "finished"))
    assert (started["rows"], started["sequences"]) == (16, 16)
    # Every answer is metered once with its question; the mismatched rows are ours.
    metered = sum(event["train_tokens"] for event in of_type(events, "progress"))
    assert metered == finished["train_tokens"] == 6 * started["train_token_count"]
    assert exported["parity"]["max_abs_difference"] <= exported["parity"]["tolerance"]


@pytest.mark.parametrize("training", [{"type": "lora", "r": 4, "dropout": 0.1}, {"type": "full"}], ids=["lora", "full"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    make_judged: Callable[..., Path], training: dict[str, Any]
) -> None:
    whole, halves = make_judged("whole", training=training), make_judged("halves", training=training)
    expected, first = run_job(whole), run_job(halves, stop_after=4)
    assert of_type(first, "stopped")
    elsewhere = make_judged("elsewhere", training=training)
    shutil.copytree(halves / "checkpoints" / "step-00000004", elsewhere / "checkpoints" / "step-00000004")
    rest = run_job(elsewhere)
    assert of_type(rest, "started")[0]["start_step"] == 4
    assert trace(rest) == trace(expected)[4:]
    assert of_type(rest, "exported")[0]["revision"] == of_type(expected, "exported")[0]["revision"]


@pytest.mark.parametrize("training", [{"type": "lora", "r": 4}, {"type": "full"}], ids=["lora", "full"])
def test_neither_micro_batches_nor_packing_move_a_loss(
    make_judged: Callable[..., Path], training: dict[str, Any]
) -> None:
    """One row at a time, and a whole step at once."""
    changes = {"training": training, "learning_rate": 1e-3}
    single, whole = (
        trace(run_job(make_judged(f"of-{tokens}", micro_batch_tokens=tokens, **changes))) for tokens in (64, 4096)
    )
    assert single == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("training", [{"type": "lora", "r": 4}, {"type": "full"}], ids=["lora", "full"])
def test_the_second_step_agrees_with_bare_transformers(
    make_judged: Callable[..., Path], training: dict[str, Any]
) -> None:
    """After one step by the engine: the loss of the next one, row by row, with the divergence of its own rows."""
    workdir = make_judged(training=training, learning_rate=5e-2, kto={"beta": 0.5, "undesirable_weight": 0.7})
    losses = trace(run_job(workdir))
    stopped = make_judged(
        "stopped", training=training, learning_rate=5e-2, kto={"beta": 0.5, "undesirable_weight": 0.7}
    )
    run_job(stopped, stop_after=4)
    inputs = inputs_of(stopped)
    spec = inputs.spec
    reference = load_base(Path(spec.base_model.directory), "cpu", full=True).base
    policy = _restored(stopped, inputs)
    step = [
        row
        for group in inputs.schedule.sequences_of_step(4, 16).tolist()
        for row in inputs.train.sequences.groups[group]
    ]
    assert inputs.train_mismatched is not None
    mixed = inputs.train_mismatched
    with torch.no_grad():
        far = [_ratio(policy, reference, *mixed.row(index)) for index in step]
        divergence = max(0.0, sum(far) / len(far))
        expected = []
        for index in step:
            ratio = _ratio(policy, reference, *inputs.train.rows.row(index))
            assert inputs.train.rows.weights is not None
            good = inputs.train.rows.weights[index] > 0
            side = 0.5 * (ratio - divergence) * (1 if good else -1)
            expected.append((1.0 if good else 0.7) * (1 - 1 / (1 + math.exp(-side))))
    assert losses[4] == pytest.approx(sum(expected) / len(expected), rel=1e-3)


def _restored(workdir: Path, inputs: Inputs) -> Any:
    """The policy after step 4, put together from its checkpoint."""
    spec = inputs.spec
    model = load_base(Path(spec.base_model.directory), "cpu", full=spec.training.type == "full")
    if isinstance(spec.training, LoraTraining):
        model = add_adapter(model, spec.training, spec.base_model.id)
    read_trained_weights(model, spec, workdir / "checkpoints" / "step-00000004")
    return model.module.eval()


def _ratio(policy: Any, reference: Any, ids: Any, labelled: Any) -> float:
    row = torch.tensor(np.array(ids, np.int64))[None]
    places = torch.tensor(np.flatnonzero(labelled[1:]))

    def score(model: Any) -> float:
        scores = torch.log_softmax(model(row).logits[0, :-1].double(), dim=-1)
        return float(scores[places, row[0, 1:][places]].sum())

    return score(policy) - score(reference)


def test_other_rows_are_refused(make_judged: Callable[..., Path]) -> None:
    workdir = make_judged()
    write_rows(workdir / "inputs" / "train.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    with pytest.raises(
        Failure, match="instruction format, which the method sft learns from; the method kto takes others"
    ):
        run_job(workdir)
    write_rows(workdir / "inputs" / "train.jsonl", [row for row in judged(12) if row["label"]])
    with pytest.raises(Failure) as refused:
        run_job(workdir)
    assert "only rows with label true" in refused.value.violations[0].description
