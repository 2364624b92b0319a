"""Rules that make a resume exact, as far as pure functions can show them: the place in the data is the step number
alone, and whatever would move it is in a digest. What needs weights is in tests/train/test_resume_traps.py."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.trainer.train.data import schedule as planning
from services.trainer.train.data.packing import sequences
from services.trainer.train.data.packing.pack import Groups
from services.trainer.train.data.packing.sequences import Sequences, make_sequences
from services.trainer.train.data.schedule import REPORT_STEPS_MAX, RunSchedule, report_schedule, schedule_run
from services.trainer.train.data.tokens.token_rows import TokenRows
from services.trainer.train.settings.spec import _OUTSIDE_THE_DIGEST
from services.trainer.train.settings.spec_json import parse_spec

ROOT = Path(__file__).parents[3]
COUNT = 23
# Settings that name files: their content counts, not their place.
_BY_CONTENT = ("base_model", "start_from")


def plan_of(count: int = COUNT, **changes: Any) -> RunSchedule:
    settings: dict[str, Any] = {
        "sequences_per_step": 4, "epochs": 3, "evaluations": 2, "checkpoints": 2, "checkpoint_every_steps": 5,
        "seed": 9,
    }  # fmt: skip
    return schedule_run(count, **{**settings, **changes})


def rows_of(lengths: list[int], first_id: int = 0) -> TokenRows:
    total = sum(lengths)
    return TokenRows(
        ids=(np.arange(total, dtype=np.int32) + first_id) % 999,
        labelled=np.ones(total, np.bool_),
        offsets=np.cumsum(np.array([0, *lengths], np.int64)),
        rows=len(lengths),
        truncated_rows=0,
        skipped_rows=0,
        longest_row_tokens=max(lengths),
    )


def test_a_step_asked_for_first_has_the_rows_it_has_after_all_steps_before_it() -> None:
    """An epoch's shuffle is not replayed, skipping resets no epoch, and nothing is drawn on the way."""
    walked = plan_of()
    expected = [walked.sequences_of_step(step, COUNT).tolist() for step in range(walked.total_steps)]
    for step in reversed(range(walked.total_steps)):
        planning._cached_order.cache_clear()
        assert plan_of().sequences_of_step(step, COUNT).tolist() == expected[step]
    epochs = [
        expected[start : start + walked.steps_per_epoch] for start in range(0, len(expected), walked.steps_per_epoch)
    ]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_last_step_of_an_epoch_takes_what_is_left_and_the_next_epoch_starts_whole() -> None:
    plan = plan_of()
    sizes = [len(plan.sequences_of_step(step, COUNT)) for step in range(plan.total_steps)]
    assert sizes == [4, 4, 4, 4, 4, 3] * 3


def test_the_order_leaves_every_global_generator_alone() -> None:
    np.random.seed(5)
    before = numpy_state()
    plan = plan_of()
    for step in range(plan.total_steps):
        plan.sequences_of_step(step, COUNT)
    assert numpy_state() == before


def numpy_state() -> str:
    state: Any = np.random.get_state(legacy=True)
    return json.dumps(state[1].tolist())


def test_whatever_resumes_reports_the_very_ranges_of_the_first_time() -> None:
    """Steps metered twice would need a second name for the same work: ranges are cut by the plan, at every checkpoint
    too."""
    plan = plan_of(epochs=7)
    ranges = list(zip((0, *plan.reports), plan.reports, strict=False))
    for at in plan.checkpoints:
        assert at in plan.report_set
        assert [span for span in ranges if span[0] >= at] == [span for span in ranges if span[1] > at]


def test_only_ranges_that_are_too_long_are_cut_and_what_resumes_reports_the_same() -> None:
    """A run of fewer steps keeps the ranges that it always had, whatever its checkpoints are."""
    assert report_schedule(250_000, 250_000, (700, 1400)) == tuple(sorted({*range(2500, 250_001, 2500), 700, 1400}))
    for every in (700, 50_000):
        stops = tuple(range(every, 1_000_001, every))
        ends = report_schedule(1_000_000, 400_000, stops)
        spans = list(pairwise((0, *ends)))
        assert {400_000, 800_000, *stops, *range(10_000, 1_000_001, 10_000)} <= set(ends)
        assert max(end - start for start, end in spans) == min(every, REPORT_STEPS_MAX)
        assert sum(end - start for start, end in spans) == 1_000_000


def test_a_position_is_worth_nothing_under_another_permutation() -> None:
    """Every setting but those that say where and how is in the digest that a checkpoint must share."""
    spec = parse_spec({"job_id": "ft-1", "base_model": {"directory": "base"}, "train_file": "train.jsonl"})
    for field in fields(spec):
        if field.name not in _BY_CONTENT:
            change: dict[str, Any] = {field.name: "changed"}
            changed = replace(spec, **change)
            assert (changed.digest() != spec.digest()) == (field.name not in _OUTSIDE_THE_DIGEST), field.name
    moved = replace(spec, base_model=replace(spec.base_model, directory="elsewhere", id="another/name"))
    assert moved.digest() == spec.digest()
    other = replace(spec, base_model=replace(spec.base_model, revision="rv_other"))
    assert other.digest() != spec.digest()


LENGTHS = [1 + (number * number * 7) % 61 for number in range(400)]


def _reversed(_pack: Callable[..., Groups]) -> Callable[..., Groups]:
    def packed(*arguments: Any) -> Groups:
        groups = _pack(*arguments)
        return Groups(np.concatenate([group[::-1] for group in groups]), groups.offsets)

    return packed


def test_a_packing_plan_that_other_code_would_make_has_another_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> Sequences:
        return make_sequences(rows_of(LENGTHS), packing=True, max_seq_length=64)

    ours = made()
    monkeypatch.setattr(sequences, "pack", _reversed(vars(sequences)["pack"]))
    assert made().digest != ours.digest
    monkeypatch.undo()
    monkeypatch.setattr(sequences, "SEQUENCES_VERSION", sequences.SEQUENCES_VERSION + 1)
    assert made().digest != ours.digest
    monkeypatch.undo()
    other_rows = make_sequences(rows_of(LENGTHS, first_id=1), packing=True, max_seq_length=64)
    assert made().digest == ours.digest != other_rows.digest


def test_the_packing_plan_never_changes_from_version_to_version() -> None:
    """Checkpoints name the plan that they were made under; a better packer must raise SEQUENCES_VERSION and this
    value."""
    groups = tuple(make_sequences(rows_of(LENGTHS), packing=True, max_seq_length=64).groups)
    assert hashlib.sha256(repr(groups).encode()).hexdigest()[:16] == "01680888f4b4f4a2"


_COUNT = """
import sys
from pathlib import Path
from services.trainer.train.data.preparation.prepare import prepare_dataset
from services.trainer.train.data.tokens.prepare_settings import PrepareSettings
from services.trainer.train.data.tokens.base_tokenizer import open_model_folder
settings = PrepareSettings(max_seq_length=64, packing=True, train_on_inputs="auto", template_date="2024-07-26")
data = prepare_dataset(Path(sys.argv[1]), "train", open_model_folder(Path(sys.argv[2])), settings, pack_rows=True)
print(data.sequences.digest, data.rows.count)
"""


def test_the_order_does_not_depend_on_how_many_workers_tokenise(tmp_path: Path, model_directory: Path) -> None:
    file = tmp_path / "train.jsonl"
    rows = [{"prompt": "ask " * (number % 7), "completion": f"answer {number}"} for number in range(3000)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = set()
    for workers, parallel in (("1", "false"), ("5", "true")):
        environment = {**os.environ, "RAYON_NUM_THREADS": workers, "TOKENIZERS_PARALLELISM": parallel}
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(
            [sys.executable, "-c", _COUNT, str(file), str(model_directory)],
            env=environment, cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        told.add(done.stdout)
    assert len(told) == 1
    assert next(iter(told)).split()[1] == "3000"
