"""Runs that start from the weights of an earlier one: which weights, from where, and what does not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from services.trainer.train.loop.run import train
from services.trainer.train.modeling.fsdp import save_shards
from services.trainer.train.settings.failures import Failure
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import load_spec
from tests.train.conftest import preferences, write_rows

Events = list[dict[str, Any]]
LORA = {"type": "lora", "r": 4}
FULL = {"type": "full"}


def run(workdir: Path) -> Events:
    events: Events = []

    def emit(kind: str, /, **fields: Any) -> None:
        events.append({"type": kind, **fields})

    train(resolve_paths(load_spec(workdir / "spec.json"), workdir), workdir, emit, lambda: False)
    return events


def one(events: Events, kind: str) -> dict[str, Any]:
    (event,) = (event for event in events if event["type"] == kind)
    return event


def losses(events: Events) -> list[float]:
    return [event["loss"] for event in events if event["type"] == "evaluation"]


def start(folder: Path, step: int = 0) -> dict[str, Any]:
    return {"directory": str(folder), "tuning_job": "projects/p/tuningJobs/ft-0", "step": step, "sha256": "a" * 64}


@pytest.mark.parametrize("training", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("source", ["export", "checkpoints/step-00000012", "shards"])
def test_a_run_begins_where_an_earlier_one_ended(
    make_job: Callable[..., Path], spawn_child: Any, training: dict[str, Any], source: str
) -> None:
    if source == "shards":
        # What two processes left that held a part of the weights each.
        source = "checkpoints/step-00000012"
        first = make_job("first", training=training, processes=2, parallelism="sharded", threads=1)
        before = [json.loads(line) for line in spawn_child(first).stdout]
        assert (first / source / "shards").is_dir()
    else:
        first = make_job("first", training=training)
        before = run(first)
    second = make_job(
        "second", training=training, start_from=start(first / source, step=12), learning_rate=1e-3, seed=9
    )
    after = run(second)
    # The first look is at the very weights that the earlier run ended with.
    assert losses(after)[0] == pytest.approx(losses(before)[-1], abs=1e-5)
    assert losses(after)[0] != pytest.approx(losses(before)[0], abs=1e-2)
    assert one(after, "started")["start_step"] == 0
    assert one(after, "finished")["step"] == 12
    lineage = one(after, "exported")["lineage"]
    assert lineage["started_from"] == {
        "tuning_job": "projects/p/tuningJobs/ft-0", "step": 12, "revision": "", "sha256": "a" * 64,
    }  # fmt: skip
    assert lineage["base_model"]["revision"] == "rv_test"


def test_the_optimizer_starts_anew(make_job: Callable[..., Path]) -> None:
    """No moment of the earlier run moves the new one: its first step equals that of a run whose files hold weights
    alone."""
    first = make_job("first", training=LORA)
    run(first)
    source = first / "checkpoints" / "step-00000012"
    bare = first / "bare"
    bare.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(source / name, bare / name)
    revisions = [
        one(run(make_job(name, training=LORA, start_from=start(folder))), "exported")["revision"]
        for name, folder in (("with", source), ("without", bare))
    ]
    assert revisions[0] == revisions[1]


@pytest.mark.parametrize("training", [LORA, FULL], ids=["lora", "full"])
def test_preferences_after_examples_are_measured_against_the_tuned_model(
    make_job: Callable[..., Path], training: dict[str, Any]
) -> None:
    first = make_job("first", training=training)
    run(first)
    second = make_job("second", training=training, method="dpo", start_from=start(first / "export"), evaluations=1)
    write_rows(second / "inputs" / "train.jsonl", preferences(8))
    write_rows(second / "inputs" / "held.jsonl", preferences(4, start=50))
    events = run(second)
    # The policy is its own reference before the first step, so that no answer has a reward yet.
    assert losses(events)[0] == pytest.approx(0.693147, abs=1e-5)


def test_a_run_that_was_killed_goes_on_from_its_own_checkpoint_not_from_the_start(
    make_job: Callable[..., Path],
) -> None:
    first = make_job("first", training=LORA)
    run(first)
    changes = {"training": LORA, "start_from": start(first / "export")}
    expected = run(make_job("whole", **changes))
    halves = make_job("halves", **changes)
    whole = halves.parent / "whole" / "checkpoints"
    shutil.rmtree(halves / "checkpoints", ignore_errors=True)
    newest = max(path for path in whole.glob("step-*") if path.name != "step-00000012")
    shutil.copytree(newest, halves / "checkpoints" / newest.name)
    rest = run(halves)
    assert one(rest, "started")["start_step"] > 0
    assert one(rest, "exported")["revision"] == one(expected, "exported")["revision"]


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"type": "lora", "r": 8}},
        {"training": {"type": "lora", "r": 4, "target_modules": ["q_proj"]}},
        {"training": FULL},
    ],
    ids=["rank", "modules", "kind"],
)
def test_weights_that_do_not_fit_are_refused(
    make_job: Callable[..., Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    first = make_job("first", training=LORA, epochs=1, evaluations=0, validation_file=None)
    run(first)
    second = make_job("second", **{**changes, "start_from": start(first / "export")})
    with pytest.raises(Failure) as refused:
        run(second)
    assert (refused.value.kind, refused.value.reason) == ("user", "MODEL_INVALID")
    assert "ft-0" in refused.value.message


def test_a_checkpoint_of_another_base_is_refused_even_if_its_layers_fit(make_job: Callable[..., Path]) -> None:
    first = make_job("first", training=LORA)
    run(first)
    base = {
        "directory": str(resolve_paths(load_spec(first / "spec.json"), first).base_model.directory),
        "revision": "rv_2",
    }
    source = first / "checkpoints" / "step-00000012"
    with pytest.raises(Failure, match="'rv_test', not 'rv_2'") as refused:
        run(make_job("second", training=LORA, base_model=base, start_from=start(source, step=12)))
    assert refused.value.reason == "MODEL_INVALID"


def test_shards_of_other_weights_are_refused(make_job: Callable[..., Path], tmp_path: Path) -> None:
    save_shards(tmp_path / "other" / "shards", {"x": torch.zeros(2)}, {})
    with pytest.raises(Failure, match="not those of this model") as refused:
        run(make_job("job", training=LORA, start_from=start(tmp_path / "other", step=12)))
    assert refused.value.reason == "MODEL_INVALID"


def test_a_torn_file_of_weights_is_refused(make_job: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "torn"
    folder.mkdir()
    save_file({"x": torch.zeros(2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    with pytest.raises(Failure) as refused:
        run(make_job("job", training=LORA, start_from=start(folder)))
    assert refused.value.reason == "MODEL_INVALID"
    assert "adapter_model.safetensors" in refused.value.message


def of_hub(folder: Path) -> dict[str, Any]:
    return {"directory": str(folder), "repository": "acme/tuned", "revision": "c" * 40, "sha256": "a" * 64}


def rewritten(folder: Path, name: str, **changes: Any) -> None:
    """A JSON file with other values."""
    document = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(document | changes))


@pytest.mark.parametrize(
    ("model", "training"),
    [
        ("tiny-llama", LORA),
        # peft notes the rank of fused experts by pattern, which is no other adapter than the one that is trained here.
        ("tiny-mixtral", {**LORA, "dropout": 0.0}),
        ("tiny-llama", FULL),
    ],
    ids=["lora", "experts", "full"],
)
def test_a_run_begins_with_the_weights_of_a_repository(
    make_job: Callable[..., Path], model: str, training: dict[str, Any]
) -> None:
    first = make_job("first", model=model, training=training)
    before = run(first)
    if training is FULL:
        # How a model is asked to stop is its base's to say, whoever tuned it.
        rewritten(first / "export", "config.json", eos_token_id=7)
    second = make_job("second", model=model, training=training, start_from=of_hub(first / "export"))
    after = run(second)
    assert losses(after)[0] == pytest.approx(losses(before)[-1], abs=1e-5)
    assert one(after, "exported")["lineage"]["started_from"] == {
        "repository": "acme/tuned", "revision": "c" * 40, "sha256": "a" * 64,
    }  # fmt: skip
    if training is FULL:
        base = resolve_paths(load_spec(second / "spec.json"), second).base_model.directory
        expected = json.loads((Path(base) / "config.json").read_text())["eos_token_id"]
        assert json.loads((second / "export" / "config.json").read_text())["eos_token_id"] == expected


@pytest.mark.parametrize(
    ("training", "file", "changes", "said"),
    [
        (FULL, "config.json", {"rms_norm_eps": 0.5}, "rms_norm_eps is 0.5"),
        (FULL, "config.json", {"hidden_size": 32}, "hidden_size is 32"),
        (FULL, "config.json", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        (FULL, "config.json", {"model_type": "never heard of"}, "config.json"),
        (LORA, "adapter_config.json", {"r": 8}, "r is 8"),
        (LORA, "adapter_config.json", {"lora_alpha": 4}, "lora_alpha is 4"),
        (LORA, "adapter_config.json", {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa' (PiSSA"),
        (LORA, "adapter_config.json", {"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        (LORA, "adapter_config.json", {"use_dora": True}, "use_dora"),
        (LORA, "adapter_config.json", {"peft_type": "IA3"}, "peft_type is 'IA3'"),
        (LORA, "adapter_config.json", {"rank_pattern": {"q_proj": 2}}, "stored weights are not those"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_repository_of_another_shape_is_refused_by_what_differs(
    make_job: Callable[..., Path], training: dict[str, Any], file: str, changes: dict[str, Any], said: str
) -> None:
    first = make_job("first", training=training, epochs=1, evaluations=0, validation_file=None)
    run(first)
    rewritten(first / "export", file, **changes)
    with pytest.raises(Failure) as refused:
        run(make_job("second", training=training, start_from=of_hub(first / "export")))
    assert (refused.value.kind, refused.value.reason) == ("user", "MODEL_INVALID")
    assert "acme/tuned" in refused.value.message
    assert said in refused.value.message


def test_an_adapter_of_a_repository_that_holds_no_numbers_is_refused(make_job: Callable[..., Path]) -> None:
    first = make_job("first", training=LORA, epochs=1, evaluations=0, validation_file=None)
    run(first)
    path = first / "export" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(Failure, match=r"acme/tuned.*no numbers") as refused:
        run(make_job("second", training=LORA, start_from=of_hub(first / "export")))
    assert refused.value.reason == "MODEL_INVALID"


@pytest.mark.parametrize("training", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=["nan", "infinite"])
def test_weights_that_are_no_numbers_are_refused_by_name(
    make_job: Callable[..., Path], training: dict[str, Any], value: float
) -> None:
    """Else the first step would be blamed for them."""
    first = make_job("first", training=training, epochs=1, evaluations=0, validation_file=None)
    run(first)
    (path,) = (first / "export").glob("*.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name][0, 1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(Failure) as refused:
        run(make_job("second", training=training, start_from=start(first / "export")))
    assert (refused.value.kind, refused.value.reason) == ("user", "MODEL_INVALID")
    assert name in refused.value.message


def changed_adapter(folder: Path, changes: dict[str, Any]) -> None:
    """The adapter as peft saves it for these settings, with the matrices that were there cut to ranks and layers."""
    rewritten(folder, "adapter_config.json", **changes)
    config = peft.LoraConfig.from_pretrained(str(folder))
    tensors = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        if not check_target_module_exists(config, module):
            continue
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
        tensors[name] = (tensor[:rank] if ".lora_A." in name else tensor[:, :rank]).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 3}, "alpha_pattern": {"k_proj": 5, "mlp.up_proj": 2.5}},
        {"use_rslora": True, "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 1}},
        {"target_modules": r".*\.(q|v|up)_proj"},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "exclude_modules": ["mlp.down_proj"]},
    ],
    ids=["rslora", "patterns", "rslora and alpha", "expression", "layers"],
)
def test_a_run_goes_on_with_the_very_adapter_that_peft_loads(
    make_job: Callable[..., Path], changes: dict[str, Any]
) -> None:
    """The first look of the run scores as the base does into which peft merged that adapter, and its export says what
    it is."""
    short = {"training": LORA, "epochs": 1, "evaluations": 1}
    first = make_job("first", **short)
    run(first)
    changed_adapter(first / "export", changes)
    second = make_job("second", start_from=of_hub(first / "export"), **short)
    after = run(second)
    directory = resolve_paths(load_spec(second / "spec.json"), second).base_model.directory
    theirs, ours = (
        peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), str(folder)
        )
        for folder in (first / "export", second / "export")
    )
    scales = [
        {name: layer.scaling["default"] for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
        for model in (theirs, ours)
    ]
    assert scales[0] == scales[1]
    merged = first / "merged"
    shutil.copytree(directory, merged)
    theirs.merge_and_unload().save_pretrained(str(merged))
    fresh = make_job("fresh", base_model={"directory": str(merged), "id": "a/b", "revision": "r"}, **short)
    assert losses(after)[0] == pytest.approx(losses(run(fresh))[0], abs=1e-5)
    assert losses(after)[0] != pytest.approx(losses(run(make_job("plain", **short)))[0], abs=1e-4)
