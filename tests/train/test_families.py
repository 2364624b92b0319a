"""Every family is trained, exported, and scored alike by the trained module, by plain peft, merged, and by vLLM.

Each case starts one vLLM (about half a minute on two cores); it earns that no model leaves that serving would read
otherwise. Two of the most unlike families run by default, all of them, as adapters and with full weights, by `make
test-families`.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from services.trainer.train.export.parity import TOLERANCE_FLOAT32_ENGINE
from services.trainer.train.export.parity_report import ENGINE, EXPORTED, MERGED
from services.trainer.train.loop.run import train
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import load_spec

ROOT = Path(__file__).parents[2]
SCORER = [
    "env",
    f"PYTHONPATH={ROOT}:{ROOT / 'gen'}",
    sys.executable,
    "-m",
    "services.inference.engines.score",
    "--threads",
    "2",
]
LORA = {"type": "lora", "r": 8, "alpha": 32}
FULL = {"type": "full"}
RATES = {"lora": 2e-2, "full": 2e-3}
# What training must have moved at least, or agreement would mean nothing.
MOVED_NATS = 0.05

FAMILIES = ("llama", "codellama", "llama3", "qwen2", "qwen3", "mistral", "mixtral", "gemma", "gemma2", "phi3")
BY_DEFAULT = {("phi3", "lora"), ("qwen3", "full")}
CASES = [
    pytest.param(family, method, marks=() if (family, method) in BY_DEFAULT else pytest.mark.families)
    for family in FAMILIES
    for method in ("lora", "full")
    # The engine serves no adapters on a mixture of experts; that has a test of its own below.
    if (family, method) != ("mixtral", "lora")
]


def exported_by(workdir: Path) -> dict[str, Any]:
    events: list[dict[str, Any]] = []
    spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
    train(spec, workdir, lambda kind, /, **fields: events.append({"type": kind, **fields}), lambda: False)
    return next(event for event in events if event["type"] == "exported")


@pytest.mark.parametrize(("family", "method"), CASES)
def test_trained_exported_merged_and_served_agree(
    family: str,
    method: str,
    make_job: Callable[..., Path],
    base_model: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, training = f"tiny-{family}", LORA if method == "lora" else FULL
    workdir = make_job(model=model, training=training, epochs=1, learning_rate=RATES[method], parity_command=SCORER)
    parity = exported_by(workdir)["parity"]
    assert parity["refused"] == {}
    expected = {EXPORTED, ENGINE} | ({MERGED} if method == "lora" else set())
    assert set(parity["comparisons"]) == expected
    for comparison in parity["comparisons"].values():
        assert comparison["tokens"] == parity["tokens"] > 20
        assert comparison["first_diverging"] is None
        assert comparison["max_abs_difference"] <= comparison["tolerance"] <= TOLERANCE_FLOAT32_ENGINE
    assert parity["answers"]["answers"] > 0
    change = moved(base_model(model), workdir, training)
    assert change > MOVED_NATS
    tell(capsys, family, method, parity, change)


@pytest.mark.families
def test_a_mixture_is_served_merged_and_its_adapter_is_refused_clearly(
    make_job: Callable[..., Path],
    base_model: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workdir = make_job(
        model="tiny-mixtral", training=LORA, epochs=1, learning_rate=RATES["lora"], parity_command=SCORER
    )
    parity = exported_by(workdir)["parity"]
    assert "serves no adapters" in parity["refused"][ENGINE]
    assert set(parity["comparisons"]) == {EXPORTED, MERGED}
    merged = tmp_path / "merged"
    module = PeftModel.from_pretrained(load(base_model("tiny-mixtral")), workdir / "export").merge_and_unload()
    module.save_pretrained(merged)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base_model("tiny-mixtral") / name, merged / name)
    rows = [[1, *range(20 + number, 60 + number)] for number in range(4)]
    request = {
        "base_model": str(base_model("tiny-mixtral")),
        "export": str(merged),
        "kind": "full",
        "rank": 0,
        "rows": rows,
        "questions": [],
    }
    done = subprocess.run(SCORER, input=json.dumps(request), capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    served = json.loads(done.stdout.splitlines()[-1])["log_probs"]
    worst = 0.0
    for ids, scores in zip(rows, served, strict=True):
        assert scores[0] is None
        worst = max(worst, float((torch.tensor(scores[1:]) - log_probs(module, ids)).abs().max()))
    assert worst <= TOLERANCE_FLOAT32_ENGINE
    change = moved(base_model("tiny-mixtral"), workdir, LORA)
    assert change > MOVED_NATS
    parity["comparisons"]["merged in the engine"] = {"max_abs_difference": worst}
    tell(capsys, "mixtral", "lora", parity, change)


def tell(capsys: pytest.CaptureFixture[str], family: str, method: str, parity: dict[str, Any], change: float) -> None:
    """The figures of docs/parity.md, for whoever runs all families."""
    found = ", ".join(f"{name} {found['max_abs_difference']:.1e}" for name, found in parity["comparisons"].items())
    with capsys.disabled():
        print(f"\n{family} {method}: {found}; trained by {change:.2f} nats, {parity['tokens']} tokens", flush=True)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def log_probs(module: Any, ids: list[int]) -> Any:
    with torch.no_grad():
        table = torch.log_softmax(module(torch.tensor([ids])).logits[0].float(), dim=-1)
    return table[:-1].gather(1, torch.tensor(ids)[1:, None]).squeeze(1)


def moved(base: Path, workdir: Path, training: dict[str, Any]) -> float:
    """The largest change of a log-probability by training, over some text."""
    ids = [1, *range(20, 80)]
    before = log_probs(load(base), ids)
    export = workdir / "export"
    trained = load(export) if training["type"] == "full" else PeftModel.from_pretrained(load(base), export).eval()
    return float((log_probs(trained, ids) - before).abs().max())
