"""What the planner predicts is what a step takes, and what it chooses changes no sum.

The measuring takes half a minute in a process of its own: every allocation of a training step is counted.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from services.trainer.train.data.run_inputs import prepare_inputs
from services.trainer.train.loop.run import train
from services.trainer.train.memory.fit import fit_to_devices, shape_of_base
from services.trainer.train.memory.memory_planner import USABLE_SHARE, Shape
from services.trainer.train.runtime.process_group import ALONE
from services.trainer.train.settings.failures import Failure
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import load_spec

Events = list[dict[str, Any]]
ERROR_MAX = 0.25
# Shape, lines, and tokens of a line: short and long, and more than the vocabulary head takes at once.
BATCHES = [("1m", 4, 64), ("1m", 2, 1024), ("12m", 4, 64), ("12m", 3, 256)]
MIXTURES = [("mixtral", 4, 128), ("mixtral", 2, 1024), ("tiny-mixtral", 4, 64), ("tiny-mixtral", 1, 512)]
MIXTURES += [("qwen3-moe", 4, 64), ("qwen3-moe", 2, 1024)]
# Eager attention, whose scores take memory with the square of a line.
EAGER = [("gemma2", 4, 64), ("gemma2", 2, 512)]
ROOMY = 2**40
SETTINGS: dict[str, Any] = {
    "micro_batch_tokens": 512,
    "evaluations": 0,
    "training": {"type": "lora", "r": 4, "dropout": 0.0},
}


def run(workdir: Path) -> Events:
    events: Events = []
    spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
    train(spec, workdir, lambda kind, /, **fields: events.append({"type": kind, **fields}), lambda: False)
    return events


def losses(events: Events) -> list[float]:
    return [step["loss"] for event in events if event["type"] == "progress" for step in event["steps"]]


def started(events: Events) -> dict[str, Any]:
    return next(event for event in events if event["type"] == "started")


def warnings(events: Events) -> list[str]:
    return [event["code"] for event in events if event["type"] == "warning"]


def needed_bytes(workdir: Path) -> int:
    """What the leanest layout takes."""
    document = json.loads((workdir / "spec.json").read_text())
    (workdir / "spec.json").write_text(json.dumps(document | {"device_memory_bytes": 1}))
    spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
    with pytest.raises(Failure) as refused:
        fit_to_devices(prepare_inputs(spec, workdir, lambda *_, **__: None), ALONE)
    return int(refused.value.details["needed_bytes"])


def test_the_prediction_is_near_the_measured_peak() -> None:
    requests = [
        {"shape": shape, "rank": rank, "lines": lines, "length": length, "checkpointing": checkpointing}
        for (shape, lines, length), rank, checkpointing in product(
            BATCHES + MIXTURES + EAGER, (16, None), (False, True)
        )
    ]
    measured = subprocess.run(
        [sys.executable, "-m", "tests.train.measure_peak", json.dumps(requests)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )
    found = [json.loads(line) for line in measured.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(requests)
    wrong = [entry for entry in found if abs(entry["predicted"] / entry["measured"] - 1) > ERROR_MAX]
    assert wrong == []
    # Recomputing is seen to save what it is said to save.
    for kept, recomputed in zip(found[::2], found[1::2], strict=True):
        assert recomputed["measured"] <= kept["measured"]
        assert recomputed["predicted"] <= kept["predicted"]
    measured_bytes, predicted_bytes = (
        [entry[name] for entry in found if entry["rank"]] for name in ("measured", "predicted")
    )
    assert all(recomputed < kept for kept, recomputed in zip(measured_bytes[::2], measured_bytes[1::2], strict=True))
    assert all(recomputed < kept for kept, recomputed in zip(predicted_bytes[::2], predicted_bytes[1::2], strict=True))


def test_a_run_that_is_fitted_into_its_device_learns_the_same(make_job: Callable[..., Path]) -> None:
    expected = run(make_job("as-set", **SETTINGS))
    assert started(expected)["predicted_peak_bytes"] is None
    lean = needed_bytes(make_job("measured", **SETTINGS))
    events = run(make_job("fitted", device_memory_bytes=int(lean / USABLE_SHARE) + 1, **SETTINGS))
    assert started(events)["micro_batch_tokens"] < started(expected)["micro_batch_tokens"] == 512
    assert started(events)["predicted_peak_bytes"] == lean
    assert losses(events) == pytest.approx(losses(expected), abs=1e-4)


def test_what_does_not_fit_is_told_before_anything_is_loaded(make_job: Callable[..., Path]) -> None:
    workdir = make_job("job", device_memory_bytes=2**20, **SETTINGS)
    with pytest.raises(Failure) as refused:
        run(workdir)
    assert (refused.value.kind, refused.value.reason) == ("user", "JOB_TOO_LARGE")
    assert refused.value.details["available_bytes"] == str(int(2**20 * USABLE_SHARE))


def test_a_shape_is_known_where_it_explains_the_weights(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Else the run goes as its settings say: a size that is wrong by far would refuse what fits."""
    for family in ("tiny-llama", "tiny-qwen2", "tiny-mixtral", "tiny-gemma", "tiny-phi3"):
        assert shape_of_base(base_model(family)) is not None, family
    base = shutil.copytree(base_model("tiny-gemma"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    assert config.pop("tie_word_embeddings")

    def shape_with(**changes: Any) -> Shape | None:
        (base / "config.json").write_text(json.dumps(config | changes))
        return shape_of_base(base)

    save_file({"norm.weight": torch.zeros(4096, 4096)}, base / "consolidated.safetensors")
    # Left to the family, and no file that is loaded holds a head.
    assert shape_with() == shape_of_base(base_model("tiny-gemma"))
    assert shape_with(intermediate_size=4 * config["intermediate_size"]) is None
    (base / "model.safetensors").write_bytes(b"torn")
    assert shape_with() is None


def test_a_resume_keeps_the_micro_batches_wherever_they_fit(make_job: Callable[..., Path]) -> None:
    """From a small device to a large one the run goes on to the very same numbers; the other way round it says that it
    may not."""
    lean = int(needed_bytes(make_job("measured", **SETTINGS)) / USABLE_SHARE) + 1
    ends = {}
    for name, size in (("small", lean), ("large", ROOMY)):
        ends[name] = run(make_job(name, device_memory_bytes=size, keep_last=20, **SETTINGS))
    assert started(ends["small"])["micro_batch_tokens"] < started(ends["large"])["micro_batch_tokens"]
    for name, size, told in (("small", ROOMY, []), ("large", lean, ["RESUME_NOT_EXACT"])):
        middle = make_job(name) / "checkpoints" / "step-00000006"
        onward = run(make_job(f"{name}-on", device_memory_bytes=size, resume_from=str(middle), **SETTINGS))
        assert (started(onward)["start_step"], warnings(onward)) == (6, told)
        assert started(onward)["micro_batch_tokens"] == started(ends["small"])["micro_batch_tokens"]
        if not told:
            assert losses(onward) == losses(ends[name])[6:]
