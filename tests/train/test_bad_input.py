"""What bad input gets: a typed failure that names the row or the setting, before or instead of a broken model."""

import json
import math
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import SafetensorError

from services.trainer.train.disk import durable
from services.trainer.train.disk.durable import read_whole_folder
from services.trainer.train.loop import reference
from services.trainer.train.loop import step as stepping
from services.trainer.train.loop.run import train
from services.trainer.train.runtime import failure_causes as causes
from services.trainer.train.settings.failures import Failure
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import load_spec
from tests.train.conftest import conversations, preferences, write_rows

Events = list[dict[str, Any]]
Make = Callable[..., Path]


def run(workdir: Path) -> Events:
    events: Events = []
    spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
    train(spec, workdir, lambda kind, /, **fields: events.append({"type": kind, **fields}), lambda: False)
    return events


def with_rows(workdir: Path, rows: list[Any]) -> Path:
    write_rows(workdir / "inputs" / "train.jsonl", rows)
    return workdir


def with_base(workdir: Path, change: Callable[[Path], object]) -> Path:
    """The job on a changed copy of its base model."""
    spec = json.loads((workdir / "spec.json").read_text())
    base = workdir / "base"
    shutil.copytree(spec["base_model"]["directory"], base)
    change(base)
    (workdir / "spec.json").write_text(json.dumps({**spec, "base_model": {**spec["base_model"], "directory": "base"}}))
    return workdir


def masked(count: int) -> list[dict[str, Any]]:
    rows = conversations(count)
    for row in rows:
        for message in row["messages"]:
            message["weight"] = 0
    return rows


def template_without_generation_prompt(make: Make) -> Path:
    return with_base(
        make(),
        lambda base: (base / "chat_template.jinja").write_text(
            "{% for message in messages %}{{ message['role'] + ':' + message['content'] + eos_token }}{% endfor %}"
        ),
    )


def checkpoint_of_another_base(make: Make) -> Path:
    run(first := make("first", epochs=1, evaluations=0))
    path = sorted((first / "checkpoints").iterdir())[-1]
    workdir = make("second", epochs=1, evaluations=0)
    spec = json.loads((workdir / "spec.json").read_text())
    base = {**spec["base_model"], "revision": "rv_other"}
    (workdir / "spec.json").write_text(json.dumps({**spec, "base_model": base, "resume_from": str(path)}))
    return workdir


def torn_checkpoint_named(make: Make) -> Path:
    run(first := make("first", epochs=1, evaluations=0))
    path = sorted((first / "checkpoints").iterdir())[-1]
    (path / "optimizer.safetensors").write_bytes(b"short")
    workdir = make("second", epochs=1, evaluations=0)
    spec = json.loads((workdir / "spec.json").read_text())
    (workdir / "spec.json").write_text(json.dumps({**spec, "resume_from": str(path)}))
    return workdir


def with_parquet(workdir: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), workdir / "inputs" / "train.parquet")
    spec = json.loads((workdir / "spec.json").read_text())
    (workdir / "spec.json").write_text(json.dumps({**spec, "train_file": "inputs/train.parquet"}))
    return workdir


def pairs(make: Make, count: int = 4, **changes: Any) -> Path:
    """A job on preferences; `changes` are of the third pair."""
    rows = preferences(count)
    rows[2] |= changes
    workdir = make(method="dpo", training={"type": "lora", "r": 4}, evaluations=0, validation_file=None)
    return with_rows(workdir, rows)


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def same_answers(make: Make) -> Path:
    rows = [{**row, "non_preferred_output": row["preferred_output"]} for row in preferences(4)]
    return with_rows(pairs(make), rows)


def questions_beyond_the_limit(make: Make) -> Path:
    rows = [{**row, "input": {"messages": [{"role": "user", "content": "word " * 900}]}} for row in preferences(4)]
    return with_rows(pairs(make), rows)


LONG = [{"messages": [{"role": "user", "content": "word " * 900}, {"role": "assistant", "content": "late"}]}]

# name -> (the job, kind, reason, words of the message, field of a violation)
CASES: dict[str, tuple[Callable[[Make], Path], str, str, str, str | None]] = {
    "every answer has weight 0": (
        lambda make: with_rows(make(), masked(3)), "user", "TRAINING_INPUT_INVALID", "(first row: line 1;", None,
    ),
    "every answer is cut off": (
        lambda make: with_rows(make(), LONG), "user", "TRAINING_INPUT_INVALID", "cut off at 512 tokens", None,
    ),
    "a broken row": (
        lambda make: with_rows(make(), [*conversations(2), {"messages": []}]),
        "user", "DATASET_INVALID", "1 invalid", "train line 3: $.messages",
    ),
    "rows longer than the model sees": (
        lambda make: make(max_seq_length=1024), "user", "INVALID_FIELD", "at most 512", "max_seq_length",
    ),
    "a template without a generation prompt": (
        template_without_generation_prompt, "user", "MODEL_INVALID", "no generation prompt", None,
    ),
    "a rank over the limit": (
        lambda make: make(training={"type": "lora", "r": 257}), "user", "INVALID_FIELD", "training.r", "training.r",
    ),
    "modules that are not there": (
        lambda make: make(training={"type": "lora", "target_modules": ["no_such"]}),
        "user", "INVALID_FIELD", "no adapter can be put", "training.target_modules",
    ),
    "dropout on fused experts": (
        lambda make: make(model="tiny-mixtral"), "user", "INVALID_FIELD", "lora_dropout", "training.dropout",
    ),
    "a checkpoint of another base": (
        checkpoint_of_another_base, "user", "MODEL_INVALID", "base model revision 'rv_test', not 'rv_other'", None,
    ),
    "a torn checkpoint that was named": (
        torn_checkpoint_named, "platform", "DATA_CORRUPT", "optimizer.safetensors", None,
    ),
    "a negative weight of a row": (
        lambda make: with_rows(make(), [*conversations(2), {**conversations(1)[0], "weight": -0.5}]),
        "user", "DATASET_INVALID", "1 invalid", "train line 3: $.weight",
    ),
    "a weight of a row that is no number": (
        lambda make: with_rows(make(), [*conversations(2), {**conversations(1)[0], "weight": math.nan}]),
        "user", "DATASET_INVALID", "1 invalid", "train line 3: $",
    ),
    "a weight of a message that is no number": (
        lambda make: with_rows(make(), [{"messages": [*said("yes"), {**said("no")[0], "weight": math.inf}]}]),
        "user", "DATASET_INVALID", "1 invalid", "train line 1: $",
    ),
    "pairs whose answers are the same": (
        same_answers, "user", "TRAINING_INPUT_INVALID", "the same as the one it is compared with", None,
    ),
    "pairs whose questions are longer than the limit": (
        questions_beyond_the_limit, "user", "TRAINING_INPUT_INVALID", "cut off at 512 tokens", None,
    ),
    "a pair with an empty answer": (
        lambda make: pairs(make, non_preferred_output=[]),
        "user", "DATASET_INVALID", "1 invalid", "train line 3: $.non_preferred_output",
    ),
    "a pair without a question": (
        lambda make: pairs(make, input={"messages": []}),
        "user", "DATASET_INVALID", "1 invalid", "train line 3: $.input.messages",
    ),
    "a pair whose question ends with an answer": (
        lambda make: pairs(make, input={"messages": said("yes")}),
        "user", "DATASET_INVALID", "1 invalid", "train line 3: $.input.messages",
    ),
    "a pair of negative weight": (
        lambda make: pairs(make, weight=-1), "user", "DATASET_INVALID", "1 invalid", "train line 3: $.weight",
    ),
    "preferences for supervised tuning": (
        lambda make: with_rows(make(), preferences(4)), "user", "DATASET_INVALID", "the method sft takes", None,
    ),
    "token ids in a column of another name": (
        lambda make: with_parquet(make(), tokens=[[1, 5, 6]]), "user", "DATASET_INVALID", "1 invalid",
        "train line 0: $",
    ),
    "labels of another length": (
        lambda make: with_parquet(make(), input_ids=[[1, 5, 6], [1, 5]], labels=[[-100, 5, 6], [-100]]),
        "user", "DATASET_INVALID", "1 invalid", "train line 2: $.labels",
    ),
    "labels beyond the vocabulary": (
        lambda make: with_parquet(make(), input_ids=[[1, 5, 6]], labels=[[-100, 5, 1024]]),
        "user", "DATASET_INVALID", "1 invalid", "train line 1: $.labels[2]",
    ),
    "token ids beyond the vocabulary": (
        lambda make: with_parquet(make(), input_ids=[[1, 5], [1, 1024]]),
        "user", "DATASET_INVALID", "1 invalid", "train line 2: $.input_ids[1]",
    ),
    "token ids of which none is labelled": (
        lambda make: with_parquet(make(), input_ids=[[1, 5]], labels=[[-100, -100]]),
        "user", "TRAINING_INPUT_INVALID", "(first row: line 1;", None,
    ),
    "a base without weights": (
        lambda make: with_base(make(), lambda base: (base / "model.safetensors").unlink()),
        "user", "MODEL_INVALID", "cannot be loaded", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_with_the_row_or_setting(name: str, make_job: Make) -> None:
    prepare, kind, reason, words, field = CASES[name]
    workdir = prepare(make_job)
    with pytest.raises(Failure) as caught:
        run(workdir)
    assert (caught.value.kind, caught.value.reason) == (kind, reason)
    assert words in caught.value.message
    assert [violation.field for violation in caught.value.violations][:1] == ([field] if field else [])
    assert not (workdir / "export").exists()
    # Whoever chose a bad checkpoint chooses another one.
    assert (caught.value.details.get("cause") == "bad_checkpoint") == (name == "a torn checkpoint that was named")


def test_rows_beyond_the_limit_are_cut_or_left_out_and_told(make_job: Make) -> None:
    rows = [*conversations(4), *LONG]
    events = run(with_rows(make_job(epochs=1, evaluations=0, max_seq_length=64), rows))
    told = [event["message"] for event in events if event["type"] == "warning" and "train file" in event["message"]]
    assert told == [
        "1 rows of the train file are longer than 64 tokens and lose their end, the first in line 5; the longest has "
        "1808",
        "1 rows of the train file have no token to train on and are left out, the first in line 5",
    ]
    started = next(event for event in events if event["type"] == "started")
    assert (started["rows"], started["skipped_rows"]) == (5, 1)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e4], ids=["nan", "infinite", "exploding"])
def test_a_run_that_diverges_stops_names_the_step_and_keeps_the_last_good_checkpoint(
    make_job: Make, monkeypatch: pytest.MonkeyPatch, poison: float
) -> None:
    whole = stepping.gradients_of_step

    def poisoned(run: Any, step: int) -> Any:
        loss, *more = whole(run, step)
        return (poison if step == 5 else loss, *more)

    monkeypatch.setattr(stepping, "gradients_of_step", poisoned)
    workdir = make_job()
    events: Events = []
    spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
    with pytest.raises(Failure, match=r"diverged at step 6.*checkpoint is at step 4") as caught:
        train(spec, workdir, lambda kind, /, **fields: events.append({"type": kind, **fields}), lambda: False)
    assert (caught.value.kind, caught.value.reason) == ("user", "TRAINING_INPUT_INVALID")
    assert (caught.value.step, caught.value.last_checkpoint_step) == (5, 4)
    # The update was not applied, and what was trained before is metered.
    assert max(event["end_step"] for event in events if event["type"] == "progress") == 5
    assert (workdir / "checkpoints" / "step-00000004").is_dir()


def test_a_weight_on_every_row_is_no_divergence(make_job: Make) -> None:
    """The loss of a step is a mean of weighted losses, and so is what it is held against."""
    workdir = make_job(epochs=1)
    with_rows(workdir, [{**row, "weight": 60} for row in conversations(8)])
    events = run(workdir)
    assert events[-1]["type"] == "finished"
    # Far beyond what a model without any knowledge loses: it was the weight.
    assert events[-1]["final_loss"] > 100


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        # The largest scale that is allowed: each update multiplies the next one, and no processor's rounding saves it.
        ({"training": {"type": "lora", "r": 1, "alpha": 1024}}, 1.0),
        ({"method": "dpo", "dpo": {"beta": 10.0}, "training": {"type": "full"}}, 1.0),
    ],
    ids=["supervised", "preferences"],
)  # fmt: skip
def test_a_rate_that_is_far_too_high_ends_the_run_by_itself(
    make_job: Make, settings: dict[str, Any], rate: float
) -> None:
    """Nothing is poisoned here: the losses grow as they do for a user who picks such a rate."""
    workdir = make_job(
        learning_rate=rate, max_grad_norm=0, epochs=10, evaluations=0, warmup_ratio=0, validation_file=None, **settings
    )
    if settings.get("method") == "dpo":
        with_rows(workdir, preferences(16))
    with pytest.raises(Failure, match=r"diverged at step \d+") as caught:
        run(workdir)
    failure = caught.value
    assert (failure.kind, failure.reason) == ("user", "TRAINING_INPUT_INVALID")
    assert failure.step is not None
    kept = [read_whole_folder(path)["step"] for path in sorted((workdir / "checkpoints").iterdir())]
    assert failure.last_checkpoint_step == (kept[-1] if kept else None)


@pytest.mark.parametrize(
    ("part", "settings", "checkpoints"),
    [
        ("tmp-export", {}, [8, 10, 12]),
        ("tmp-best", {"early_stopping": {"patience": 2}}, [2]),
    ],
)
def test_a_full_disk_fails_cleanly_also_where_no_checkpoint_is_written(
    make_job: Make, monkeypatch: pytest.MonkeyPatch, part: str, settings: dict[str, Any], checkpoints: list[int]
) -> None:
    """When there is room again, the run goes on to the same model."""
    run(undisturbed := make_job("undisturbed", **settings))
    workdir = make_job("full", **settings)
    whole, limits = durable._fill, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(unfinished: Path, *more: Any) -> Any:
        if part not in str(unfinished) or not list((workdir / "checkpoints").glob("step-*")):
            return whole(unfinished, *more)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            return whole(unfinished, *more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "_fill", fill)
        with pytest.raises(Failure, match="the disk is full") as caught:
            run(workdir)
    assert (caught.value.kind, caught.value.details) == ("platform", {"cause": "disk_full"})
    kept = [read_whole_folder(path)["step"] for path in sorted((workdir / "checkpoints").iterdir())]
    assert kept == checkpoints
    assert not list(workdir.rglob("tmp-*"))
    events = run(workdir)
    assert next(event for event in events if event["type"] == "started")["start_step"] == checkpoints[-1]
    for path in sorted((undisturbed / "export").iterdir()):
        assert (workdir / "export" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_full_disk_is_named_before_the_first_step_too(make_job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference of preferences is written by a library that wraps the error."""

    def refused(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(reference, "save_file", refused)
    workdir = make_job(method="dpo", training={"type": "full"}, evaluations=0, validation_file=None)
    with pytest.raises(SafetensorError) as caught:
        run(with_rows(workdir, preferences(4)))
    failure = causes.explain(caught.value)
    assert (failure.kind, failure.reason, failure.details) == ("platform", "TRAINING_FAILED", {"cause": "disk_full"})
