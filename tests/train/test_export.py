"""What is shipped is what was trained: in plain peft, in plain transformers, or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.trainer.train import loop
from services.trainer.train.export import write_export
from services.trainer.train.failures import Failure
from services.trainer.train.loop import train
from services.trainer.train.spec import load_spec, resolve_paths

Events = list[dict[str, Any]]
FAMILIES = ("tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-mistral", "tiny-mixtral", "tiny-gemma")


def run_in_process(workdir: Path) -> Events:
    events: Events = []
    spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
    train(spec, workdir, lambda kind, **fields: events.append({"type": kind, **fields}), lambda: False)
    return events


def validation_loss(module: Any, tokenizer: Any, workdir: Path) -> float:
    """By hand, from the rows: mean negative log-probability of the answers' tokens."""
    module.eval()
    scores: list[float] = []
    for line in (workdir / "inputs" / "held.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        with torch.no_grad():
            table = torch.log_softmax(module(torch.tensor([ids])).logits[0].float(), dim=-1)
        for turn in range(1, len(messages), 2):
            start = len(tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, return_dict=False))
            end = len(tokenizer.apply_chat_template(messages[: turn + 1], return_dict=False))
            scores += [-table[position - 1, ids[position]].item() for position in range(start, end)]
    return sum(scores) / len(scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_loads_in_plain_peft_and_scores_as_reported(
    family: str, make_job: Callable[..., Path], base_model: Callable[[str], Path]
) -> None:
    # peft knows no dropout on the fused experts of a mixture.
    training = {"type": "lora", "r": 4, "dropout": 0.0 if family == "tiny-mixtral" else 0.1}
    workdir = make_job(model=family, training=training, epochs=1, checkpoint_every_steps=6)
    events = run_in_process(workdir)
    assert sorted(path.name for path in (workdir / "export").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    base = AutoModelForCausalLM.from_pretrained(base_model(family))
    tokenizer = AutoTokenizer.from_pretrained(base_model(family))
    module = PeftModel.from_pretrained(base, workdir / "export")
    reported = [event["loss"] for event in events if event["type"] == "evaluation"][-1]
    assert validation_loss(module, tokenizer, workdir) == pytest.approx(reported, abs=1e-4)
    exported = next(event for event in events if event["type"] == "exported")
    assert exported["parity"]["max_abs_difference"] <= exported["parity"]["tolerance"] == 1e-3


def test_full_weights_load_in_plain_transformers_with_tokenizer_and_template(make_job: Callable[..., Path]) -> None:
    workdir = make_job(training={"type": "full"}, learning_rate=1e-3, epochs=1)
    events = run_in_process(workdir)
    module = AutoModelForCausalLM.from_pretrained(workdir / "export")
    tokenizer = AutoTokenizer.from_pretrained(workdir / "export")
    reported = [event["loss"] for event in events if event["type"] == "evaluation"][-1]
    assert validation_loss(module, tokenizer, workdir) == pytest.approx(reported, abs=1e-4)


def test_an_export_that_differs_from_the_trained_module_fails_the_run(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_damaged(model: Any, spec: Any, folder: Path) -> None:
        write_export(model, spec, folder)
        path = folder / "adapter_model.safetensors"
        save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path)

    monkeypatch.setattr(loop, "write_export", write_damaged)
    with pytest.raises(Failure) as caught:
        run_in_process(make_job())
    assert (caught.value.kind, caught.value.reason, caught.value.step) == ("platform", "PARITY_FAILED", 12)


def test_a_diverging_run_stops_names_the_step_and_keeps_the_last_good_checkpoint(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(step: int, *_: Any) -> float:
        return float("nan") if step == 4 else 1e-3

    monkeypatch.setattr(loop, "learning_rate_at", poison)
    events: Events = []
    spec = resolve_paths(load_spec((workdir := make_job()) / "spec.json"), workdir)
    with pytest.raises(Failure, match=r"diverged at step 6.*checkpoint is at step 4") as caught:
        train(spec, workdir, lambda kind, **fields: events.append({"type": kind, **fields}), lambda: False)
    assert (caught.value.kind, caught.value.reason) == ("user", "TRAINING_INPUT_INVALID")
    assert (caught.value.step, caught.value.last_checkpoint_step) == (5, 4)
    assert max(event["end_step"] for event in events if event["type"] == "progress") == 5


@pytest.mark.parametrize(
    ("change", "code", "kind", "reason"),
    [
        ({"epochs": 0}, 2, "user", "INVALID_FIELD"),
        ({"base_model": {"directory": "nowhere"}}, 2, "user", "MODEL_INVALID"),
        ({"max_seq_length": 100_000}, 2, "user", "INVALID_FIELD"),
        ({"training": {"type": "lora", "target_modules": ["no_such"]}}, 2, "user", "INVALID_FIELD"),
        ({"train_file": "inputs/none.jsonl"}, 2, "user", "TRAINING_INPUT_INVALID"),
    ],
)
def test_a_run_that_cannot_be_fails_typed(
    make_job: Callable[..., Path], spawn_child: Any, change: dict[str, Any], code: int, kind: str, reason: str
) -> None:
    child = spawn_child(make_job(**change))
    events = [json.loads(line) for line in child.stdout]
    assert child.wait(timeout=60) == code
    assert (events[-1]["type"], events[-1]["kind"], events[-1]["reason"]) == ("failed", kind, reason)


def test_a_full_disk_is_ours_and_leaves_the_committed_checkpoint(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loop.save_checkpoint

    def no_space(root: Path, position: Any, *more: Any, **named: Any) -> Any:
        if position.step > 2:
            raise OSError(28, "No space left on device")
        return whole(root, position, *more, **named)

    monkeypatch.setattr(loop, "save_checkpoint", no_space)
    workdir = make_job()
    with pytest.raises(OSError, match="No space left"):
        run_in_process(workdir)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    events = run_in_process(workdir)
    assert events[0]["start_step"] == 2
