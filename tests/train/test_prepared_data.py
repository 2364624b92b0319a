"""How data is prepared decides nothing: several processes, a cache shared by attempts, or neither give the same bytes.

The processes are started from one that has torch and its threads loaded and has left the folder of the package, as a
warm child has.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.trainer.train.data import run_inputs as inputs
from services.trainer.train.data.preparation import prepare
from services.trainer.train.data.tokens import chunks, tokenized_file
from services.trainer.train.loop.run import train
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import load_spec


def ran(workdir: Path) -> tuple[list[dict[str, Any]], str]:
    """The events of a run and the digest of what it made."""
    events: list[dict[str, Any]] = []
    spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
    train(spec, workdir, lambda kind, /, **fields: events.append({"type": kind, **fields}), lambda: False)
    (exported,) = [event for event in events if event["type"] == "exported"]
    weights = workdir / exported["path"] / "adapter_model.safetensors"
    return events, hashlib.sha256(weights.read_bytes()).hexdigest()


def told(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["type"] == kind]


def test_workers_and_cache_change_no_bit_and_an_attempt_takes_what_the_first_one_made(
    make_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_events, plain = ran(make_job("plain", packing=True))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenized_file, "PARALLEL_BYTES_MIN", 0)
    monkeypatch.setattr(tokenized_file, "REPORT_EVERY_S", 0.0)
    monkeypatch.setattr(prepare, "CACHED_FILE_BYTES_MIN", 0)
    monkeypatch.setattr(chunks, "CHUNK_LINES_MAX", 5)
    directories = {"cache": str(tmp_path / "prepared"), "workers": 2}
    first_events, first = ran(make_job("first", packing=True, directories=directories))
    again_events, again = ran(make_job("again", packing=True, directories=directories))
    assert first == again == plain
    (plain_start,), (first_start,), (again_start,) = (
        told(events, "started") for events in (plain_events, first_events, again_events)
    )
    for name in ("packing_digest", "train_token_count", "validation_token_count", "sequences", "total_steps"):
        assert first_start[name] == again_start[name] == plain_start[name], name

    # It says how far it is while it reads; what is taken from the cache is not read again.
    heard = told(first_events, "preparing")
    assert {event["file"] for event in heard} == {"train", "validation"}
    assert heard[-1]["bytes_read"] == heard[-1]["bytes_total"]
    assert all(event["rows_per_second"] > 0 for event in heard)
    assert not told(again_events, "preparing")


def test_without_a_cache_of_the_machine_the_work_folder_is_one(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "CACHED_FILE_BYTES_MIN", 0)
    workdir = make_job("job", evaluations=0, epochs=1)
    ran(workdir)
    kept = [path for path in (workdir / inputs.PREPARED).iterdir() if path.name != "locks"]
    assert len(kept) == 2
