"""What is shipped is what was trained: in plain peft, in plain transformers, or not at all."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.trainer.train.data.run_inputs import prepare_inputs
from services.trainer.train.export.greedy_answers import ANSWERS_MAX
from services.trainer.train.export.parity import TOLERANCE_REDUCED, check_parity
from services.trainer.train.loop import finish
from services.trainer.train.loop.run import train
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.modeling.lora import add_adapter
from services.trainer.train.modeling.trained_weights import read_trained_weights
from services.trainer.train.settings.failures import Failure
from services.trainer.train.settings.spec import LoraTraining, resolve_paths
from services.trainer.train.settings.spec_json import load_spec
from tests.train.plain_engine import plain_engine

TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
Events = list[dict[str, Any]]
FAMILIES = (
    "tiny-llama", "tiny-codellama", "tiny-llama3", "tiny-qwen2", "tiny-qwen3", "tiny-mistral", "tiny-mixtral",
    "tiny-gemma", "tiny-phi3",
)  # fmt: skip


def run_in_process(workdir: Path) -> Events:
    events: Events = []
    spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
    train(spec, workdir, lambda kind, /, **fields: events.append({"type": kind, **fields}), lambda: False)
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
    written = {path.name for path in (workdir / "export").iterdir()}
    # Transformers reads every tokenizer of a model of this type as Qwen's own.
    own = family == "tiny-qwen2"
    assert written == {"adapter_config.json", "adapter_model.safetensors"} | (TOKENIZER_FILES if own else set())
    base = AutoModelForCausalLM.from_pretrained(base_model(family))
    tokenizer = AutoTokenizer.from_pretrained(workdir / "export" if own else base_model(family))
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


def test_the_config_of_full_weights_is_the_bases(
    make_job: Callable[..., Path], base_model: Callable[[str], Path]
) -> None:
    """Or a setting of training would be one of serving from here on: without a cache of keys and values, say."""
    workdir = make_job(training={"type": "full"}, epochs=1)
    run_in_process(workdir)
    exported, base = (
        json.loads((folder / "config.json").read_text()) for folder in (workdir / "export", base_model("tiny-llama"))
    )
    written_anew = {"dtype", "transformers_version"}
    assert {name: exported[name] for name in exported.keys() - written_anew} == {
        name: base[name] for name in base.keys() - written_anew
    }


def parity_of(events: Events) -> dict[str, Any]:
    return next(event for event in events if event["type"] == "exported")["parity"]


def test_the_parity_report_goes_with_the_model(make_job: Callable[..., Path]) -> None:
    workdir = make_job(parity_rows=4)
    parity = parity_of(run_in_process(workdir))
    assert (parity["rows"], parity["refused"], set(parity["comparisons"])) == (4, {}, {"exported", "merged"})
    for comparison in parity["comparisons"].values():
        assert comparison["tokens"] == parity["tokens"] > 8
        assert 0 <= comparison["mean_abs_difference"] <= comparison["max_abs_difference"] <= comparison["tolerance"]
        assert comparison["first_diverging"] is None


@pytest.mark.parametrize("training", [{"type": "lora", "r": 4}, {"type": "full"}], ids=["lora", "full"])
def test_an_export_that_is_broken_before_the_gate_fails_the_run_with_the_report(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, training: dict[str, Any]
) -> None:
    whole = vars(finish)["check_parity"]

    def check_broken(model: Any, spec: Any, export: Path, *more: Any, **named: Any) -> Any:
        (path,) = export.glob("*.safetensors")
        save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
        return whole(model, spec, export, *more, **named)

    monkeypatch.setattr(finish, "check_parity", check_broken)
    events: Events = []
    workdir = make_job(training=training, learning_rate=1e-2)
    spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
    with pytest.raises(Failure, match=r"the exported weights score .* the first is token \d+ of row \d+") as caught:
        train(spec, workdir, lambda kind, /, **fields: events.append({"type": kind, **fields}), lambda: False)
    assert (caught.value.kind, caught.value.reason, caught.value.step) == ("platform", "PARITY_FAILED", 12)
    assert not [event for event in events if event["type"] in ("exported", "finished")]
    report = json.loads(caught.value.details["parity.exported"])
    first = report["first_diverging"]
    assert report["max_abs_difference"] >= abs(first["trained"] - first["scored"]) > report["tolerance"]
    ids = [token for token in inputs_of(workdir).validation.rows.row(first["row"])[0]]
    assert ids[first["position"]] == first["token_id"]
    # What was trained is not lost.
    assert (workdir / "checkpoints" / "step-00000012").is_dir()


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-mixtral", "tiny-gemma"])
def test_an_export_without_the_adapter_is_told_in_reduced_precision(family: str, make_job: Callable[..., Path]) -> None:
    """A training that moves less than the tolerance of 16 bits; another attention stands for the kernels of a GPU."""
    training = {"type": "lora", "r": 4, "dropout": 0.0}
    workdir = make_job(model=family, training=training, learning_rate=5e-4, epochs=1, evaluations=0)
    run_in_process(workdir)
    spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
    rows = inputs_of(workdir).validation.rows
    base = AutoModelForCausalLM.from_pretrained(
        spec.base_model.directory, dtype=torch.bfloat16, attn_implementation="eager"
    )
    model = CausalModel(module=base, base=base, device="cpu", softcap=None, kernels=("eager",))
    assert isinstance(spec.training, LoraTraining)
    model = add_adapter(model, spec.training, spec.base_model.id)
    read_trained_weights(model, spec, workdir / "export")
    report = check_parity(model, spec, workdir / "export", rows, ends={2})
    assert report is not None
    sound = report.comparisons["exported"]
    assert sound.mean_from_base is not None
    assert 3 * sound.mean_abs_difference < sound.mean_from_base < TOLERANCE_REDUCED

    path = workdir / "export" / "adapter_model.safetensors"
    save_file(
        {name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"}
    )
    with pytest.raises(Failure, match="the exported weights score 60 tokens as the base does") as caught:
        check_parity(model, spec, workdir / "export", rows, ends={2})
    assert caught.value.reason == "PARITY_FAILED"


def scorer(tmp_path: Path, answer: str) -> list[str]:
    path = tmp_path / "scorer.py"
    silent = "{'answers': [{'ids': [], 'stopped': False} for _ in request['questions']]}"
    path.write_text(f"import json, sys\nrequest = json.load(sys.stdin)\nprint(json.dumps({silent} | {answer}))\n")
    return [sys.executable, str(path)]


def test_an_engine_that_reads_the_export_otherwise_fails_the_run(make_job: Callable[..., Path], tmp_path: Path) -> None:
    command = scorer(tmp_path, "{'log_probs': [[-0.5] * len(row) for row in request['rows']]}")
    with pytest.raises(Failure, match="the engine weights score") as caught:
        run_in_process(make_job(parity_command=command))
    assert caught.value.reason == "PARITY_FAILED"
    assert json.loads(caught.value.details["parity.exported"])["first_diverging"] is None
    assert json.loads(caught.value.details["parity.engine"])["first_diverging"]["scored"] == -0.5


def test_an_engine_that_refuses_is_named_and_one_that_is_silent_about_all_fails(
    make_job: Callable[..., Path], tmp_path: Path
) -> None:
    command = scorer(tmp_path, "{'refused': 'serves no adapters'}")
    assert parity_of(run_in_process(make_job("a", parity_command=command)))["refused"] == {
        "engine": "serves no adapters"
    }
    command = scorer(tmp_path, "{'log_probs': [[None] * len(row) for row in request['rows']]}")
    with pytest.raises(Failure, match="the engine weights score 0 tokens"):
        run_in_process(make_job("b", parity_command=command))


def test_an_engine_with_the_settings_of_ours_agrees_with_whole_weights(
    make_job: Callable[..., Path], tmp_path: Path
) -> None:
    settings = {"training": {"type": "full"}, "learning_rate": 1e-3, "epochs": 1, "evaluations": 0}
    parity = parity_of(run_in_process(make_job(parity_command=plain_engine(tmp_path), **settings)))
    assert parity["comparisons"]["engine"]["max_abs_difference"] < 1e-4
    assert parity["answers"]["answers"] == ANSWERS_MAX
    assert parity["answers"]["largest_gap"] < 1e-4


def inputs_of(workdir: Path) -> Any:
    return prepare_inputs(resolve_paths(load_spec(workdir / "spec.json"), workdir), workdir, lambda *_, **__: None)


def sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_the_lineage_says_what_made_the_weights(
    make_job: Callable[..., Path], base_model: Callable[[str], Path]
) -> None:
    workdir = make_job()
    events = run_in_process(workdir)
    started = next(event for event in events if event["type"] == "started")
    lineage = next(event for event in events if event["type"] == "exported")["lineage"]
    spec = load_spec(workdir / "spec.json")
    inputs = inputs_of(workdir)
    assert lineage["base_model"] == {"id": "finemesh/tiny-llama", "revision": "rv_test"}
    assert lineage["train_sha256"] == sha256((workdir / "inputs" / "train.jsonl").read_bytes())
    assert lineage["validation_sha256"] == sha256((workdir / "inputs" / "held.jsonl").read_bytes())
    assert lineage["packing_digest"] == started["packing_digest"] == inputs.train.sequences.digest
    assert lineage["template_sha256"] == sha256((base_model("tiny-llama") / "chat_template.jinja").read_bytes())
    assert lineage["tokenizer_sha256"] == inputs.folder.tokenizer_sha256
    assert (lineage["spec_digest"], lineage["seed"]) == (spec.digest(), spec.seed)
    assert lineage["spec_digest"] == sha256(json.dumps(lineage["spec"], sort_keys=True).encode())
    assert lineage["spec"]["learning_rate"] == spec.learning_rate
    assert set(lineage["versions"]) >= {"torch", "transformers", "peft", "tokenizers", "numpy"}
    assert len(lineage["code_sha256"]) == 64
    assert {"machine", "processor"} <= set(lineage["hardware"])
    assert lineage["train_tokens"] == 2 * lineage["train_token_count"] == 2 * started["train_token_count"]
    assert lineage["validation_tokens"] == 4 * started["validation_token_count"]
    assert lineage["trained_token_count"] == started["trained_token_count"]
    assert (lineage["rows"], lineage["sequences"], lineage["steps"]) == (24, 24, 12)
    # It tells nothing of this machine's folders, so it may travel.
    assert str(workdir) not in json.dumps(lineage)
    assert str(base_model("tiny-llama")) not in json.dumps(lineage)


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
