"""Preferences end to end on a tiny model: against a few lines of bare transformers, exact over a kill, and by the right
reference."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from services.trainer.train.data.batches.micro_batch import micro_batches
from services.trainer.train.data.run_inputs import prepare_inputs
from services.trainer.train.disk.durable import sha256_file
from services.trainer.train.loop import reference
from services.trainer.train.loop import start_run as start
from services.trainer.train.losses.objective import answer_log_probs
from services.trainer.train.modeling.base_model import load_base
from services.trainer.train.modeling.trained_weights import read_trained_weights
from services.trainer.train.runtime.process_group import ALONE
from services.trainer.train.settings.failures import Failure
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import load_spec
from tests.train.conftest import preferences, run_job, write_rows

Events = list[dict[str, Any]]


@pytest.fixture
def make_pairs(make_job: Callable[..., Path]) -> Callable[..., Path]:
    """As `make_job`: 16 training and 6 validation pairs, 8 steps of 4 pairs in 2 epochs, without dropout."""

    def get(name: str = "job", **changes: Any) -> Path:
        wanted = {"method": "dpo", "training": {"type": "lora", "r": 4}, "evaluations": 1, **changes}
        workdir = make_job(name, **wanted)
        write_rows(workdir / "inputs" / "train.jsonl", preferences(16))
        write_rows(workdir / "inputs" / "held.jsonl", preferences(6, start=100))
        return workdir

    return get


def of_type(events: Events, kind: str) -> Events:
    return [event for event in events if event["type"] == kind]


def trace(events: Events) -> list[float]:
    return [step["loss"] for event in of_type(events, "progress") for step in event["steps"]]


def test_an_adapter_learns_to_prefer_and_everything_is_told(make_pairs: Callable[..., Path]) -> None:
    events = run_job(make_pairs(epochs=4, learning_rate=2e-2))
    assert trace(events)[0] == pytest.approx(0.693147, abs=1e-5)
    before, *_, after = of_type(events, "evaluation")
    assert (before["loss"], before["reward_accuracy"], before["reward_margin"]) == (pytest.approx(0.693147), 0.0, 0.0)
    assert after["loss"] < 0.5
    assert after["reward_accuracy"] > 0.8
    assert after["reward_margin"] > 0
    (started,), (exported,), (finished,) = (of_type(events, kind) for kind in ("started", "exported", "finished"))
    assert (started["rows"], started["sequences"]) == (16, 16)
    # The tokens of both answers are metered, and all of them.
    metered = sum(event["train_tokens"] for event in of_type(events, "progress"))
    assert metered == finished["train_tokens"] == 4 * started["train_token_count"]
    assert exported["parity"]["max_abs_difference"] <= exported["parity"]["tolerance"]
    assert finished["validation_tokens"] == 4 * started["validation_token_count"]


@pytest.mark.parametrize(
    "dpo",
    [
        {"simpo_gamma": 0.5, "beta": 2.0},
        {"rpo_alpha": 1.0},
        {"reference_free": True},
        {"normalize_logratios_by_length": True},
    ],
    ids=["simpo", "rpo", "reference-free", "by-length"],
)
def test_every_variant_lowers_its_own_loss(make_pairs: Callable[..., Path], dpo: dict[str, Any]) -> None:
    events = run_job(make_pairs(dpo=dpo, epochs=3, learning_rate=2e-2))
    assert of_type(events, "evaluation")[-1]["loss"] < of_type(events, "evaluation")[0]["loss"]


@pytest.mark.parametrize("training", [{"type": "lora", "r": 4, "dropout": 0.1}, {"type": "full"}], ids=["lora", "full"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    make_pairs: Callable[..., Path], training: dict[str, Any]
) -> None:
    whole, halves = make_pairs("whole", training=training), make_pairs("halves", training=training)
    expected, first = run_job(whole), run_job(halves, stop_after=4)
    assert of_type(first, "stopped")
    # On another machine only the checkpoint comes along.
    elsewhere = make_pairs("elsewhere", training=training)
    shutil.copytree(halves / "checkpoints" / "step-00000004", elsewhere / "checkpoints" / "step-00000004")
    rest = run_job(elsewhere)
    assert of_type(rest, "started")[0]["start_step"] == 4
    assert trace(rest) == trace(expected)[4:]
    assert of_type(rest, "exported")[0]["revision"] == of_type(expected, "exported")[0]["revision"]


def test_a_reference_under_the_weights_of_a_checkpoint_would_be_noticed(
    make_pairs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap: log-probabilities made again after the checkpoint's weights are in."""
    training = {"type": "full"}
    expected, whole = run_job(make_pairs("whole", training=training)), reference.stored_reference
    run_job(make_pairs("halves", training=training), stop_after=4)

    def under_its_weights(inputs: Any, model: Any, group: Any, emit: Any, checkpoint: Path) -> Any:
        read_trained_weights(model, inputs.spec, checkpoint)
        (inputs.workdir / reference.REFERENCE).unlink()
        return whole(inputs, model, group, emit, None)

    monkeypatch.setattr(start, "stored_reference", under_its_weights)
    rest = run_job(make_pairs("halves", training=training))
    assert of_type(rest, "started")[0]["start_step"] == 4
    assert trace(rest)[0] != trace(expected)[4]


def test_a_run_that_was_killed_while_it_wrote_its_reference_writes_it_again(
    make_pairs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"type": "full"}
    expected, whole = run_job(make_pairs("whole", training=training)), vars(reference)["save_file"]

    class Killed(BaseException):
        """Nothing on the way catches it."""

    def killed(tensors: Any, path: Path, **more: Any) -> None:
        whole(tensors, path, **more)
        path.write_bytes(path.read_bytes()[:100])
        raise Killed

    workdir = make_pairs("killed", training=training)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "save_file", killed)
        with pytest.raises(Killed):
            run_job(workdir)
    events = run_job(workdir)
    assert [event["message"] for event in of_type(events, "warning")] == [
        "tmp-reference.safetensors was left unfinished"
    ]
    assert trace(events) == trace(expected)


def test_the_layouts_score_the_same(make_pairs: Callable[..., Path]) -> None:
    workdir = make_pairs()
    inputs = prepare_inputs(resolve_paths(load_spec(workdir / "spec.json"), workdir), workdir, lambda *_, **__: None)
    model = load_base(Path(inputs.spec.base_model.directory), "cpu", full=True)
    rows, found = inputs.train.rows, {}
    for layout in ("padded", "packed"):
        batches = micro_batches(rows, [0, 2, 4, 6], tokens_max=100, layout=layout, device="cpu", width=2)
        assert all(
            first + 1 == second
            for batch in batches
            for first, second in zip(batch.rows[::2], batch.rows[1::2], strict=True)
        )
        scores: dict[int, float] = {}
        for batch in batches:
            assert batch.label_counts.tolist() == [int(rows.row(row)[1][1:].sum()) for row in batch.rows]
            with torch.no_grad():
                scores |= dict(zip(batch.rows, answer_log_probs(model, batch).tolist(), strict=True))
        found[layout] = [scores[row] for row in range(8)]
    assert found["padded"] == pytest.approx(found["packed"], abs=1e-4)


def test_a_reference_belongs_to_the_weights_and_rows_that_it_was_made_from(make_pairs: Callable[..., Path]) -> None:
    """What lies in the work folder or in a checkpoint under other weights is not used: the scores are made again."""
    workdir = make_pairs(training={"type": "full"})
    spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
    inputs = prepare_inputs(spec, workdir, lambda *_, **__: None)
    model = load_base(Path(spec.base_model.directory), "cpu", full=True)

    def scores() -> list[float]:
        stored = reference.stored_reference(inputs, model, ALONE, lambda *_, **__: None, None)
        found: list[float] = stored[reference.TRAIN]._scores.tolist()
        return found

    first = scores()
    written = sha256_file(workdir / reference.REFERENCE)
    for parameter in model.trainable.values():
        parameter.data.mul_(1.1)
    # The weights in memory moved, as they do in training; the run started from those on disk.
    assert scores() == first
    assert sha256_file(workdir / reference.REFERENCE) == written
    other_base = workdir / "base"
    shutil.copytree(spec.base_model.directory, other_base)
    model.base.save_pretrained(str(other_base))
    document = json.loads((workdir / "spec.json").read_text())
    document["base_model"]["directory"] = str(other_base)
    (workdir / "spec.json").write_text(json.dumps(document))
    inputs = prepare_inputs(resolve_paths(load_spec(workdir / "spec.json"), workdir), workdir, lambda *_, **__: None)
    assert scores() != first


def test_files_of_the_wrong_kind_are_refused(make_pairs: Callable[..., Path], make_job: Callable[..., Path]) -> None:
    pairs_for_sft = make_pairs("pairs", method="sft")
    rows_for_dpo = make_job("rows", method="dpo")
    for workdir in (pairs_for_sft, rows_for_dpo):
        with pytest.raises(Failure) as refused:
            run_job(workdir)
        assert (refused.value.kind, refused.value.reason) == ("user", "DATASET_INVALID")
