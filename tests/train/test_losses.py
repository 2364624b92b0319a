"""The arithmetic: chunked against plain, packed against alone, templates as transformers renders them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from services.trainer.train.data.batches.micro_batch import micro_batches
from services.trainer.train.data.run_inputs import prepare_inputs
from services.trainer.train.loop.run import train
from services.trainer.train.losses import cross_entropy as loss_module
from services.trainer.train.losses.cross_entropy import cross_entropy_sum, log_probs
from services.trainer.train.modeling.base_model import load_base
from services.trainer.train.settings.failures import Failure
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import load_spec
from tests.train.conftest import write_job
from tests.train.head_case import head_case

ORIGINAL_CONTEXT = 48
FAMILIES = ("tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-mistral", "tiny-mixtral", "tiny-gemma")


def inputs_of(workdir: Path) -> Any:
    return prepare_inputs(resolve_paths(load_spec(workdir / "spec.json"), workdir), workdir, lambda *_, **__: None)


def run_in_process(workdir: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    spec = resolve_paths(load_spec(workdir / "spec.json"), workdir)
    train(spec, workdir, lambda kind, /, **fields: events.append({"type": kind, **fields}), lambda: False)
    return events


def trace(events: list[dict[str, Any]]) -> list[float]:
    return [step["loss"] for event in events if event["type"] == "progress" for step in event["steps"]]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_chunked_cross_entropy_is_the_plain_one_with_its_gradients(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", 7)
    hidden, weight, labels, capped = head_case(softcap)
    plain = functional.cross_entropy(capped, labels, reduction="sum")
    expected = torch.autograd.grad(3.0 * plain, [hidden, weight])
    ours = cross_entropy_sum(hidden, weight, labels, softcap)
    found = torch.autograd.grad(3.0 * ours, [hidden, weight])
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(-log_probs(hidden, weight, labels, softcap).sum(), plain)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_factors_multiply_the_loss_of_each_row_and_its_gradient(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", 7)
    hidden, weight, labels, capped = head_case(softcap)
    factors = torch.rand(33) * 3
    written_out = -(factors * torch.log_softmax(capped, dim=-1)[torch.arange(33), labels]).sum()
    ours = cross_entropy_sum(hidden, weight, labels, softcap, factors)
    torch.testing.assert_close(ours, written_out, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(written_out, [hidden, weight])
    for one, other in zip(torch.autograd.grad(ours, [hidden, weight]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_rows_weight_multiplies_its_loss(make_job: Callable[..., Path], base_model: Any) -> None:
    """loss = sum_i weight_i * sum_t -log p(token_t) / labelled tokens of all rows; a row of weight 0 is not there at
    all."""
    workdir = make_job(training={"type": "full"}, evaluations=0, learning_rate=1e-9, epochs=1, batch_size=24)
    train_file = workdir / "inputs" / "train.jsonl"
    weights = [0.0 if number == 5 else 0.25 + number / 8 for number in range(24)]
    rows = [json.loads(line) for line in train_file.read_text().splitlines()]
    weighted = [json.dumps({**row, "weight": weight}) for row, weight in zip(rows, weights, strict=True)]
    train_file.write_text("\n".join(weighted))
    ours = trace(run_in_process(workdir))

    kept = inputs_of(workdir).train.rows
    assert (kept.rows, kept.count, kept.skipped_rows) == (24, 23, 1)
    model = AutoModelForCausalLM.from_pretrained(base_model("tiny-llama"), dtype=torch.float32).eval()
    total, labelled_count = 0.0, 0
    for row, weight in enumerate(weight for weight in weights if weight):
        ids, labelled = kept.row(row)
        with torch.no_grad():
            table = torch.log_softmax(model(input_ids=torch.from_numpy(ids).long()[None]).logits[0], dim=-1)
        chosen = [position for position in range(1, len(ids)) if labelled[position]]
        total -= weight * sum(table[position - 1, int(ids[position])].item() for position in chosen)
        labelled_count += len(chosen)
    assert ours == [pytest.approx(total / labelled_count, abs=1e-4)]


def with_longrope(base: Path, folder: Path) -> Path:
    """Of rotations that transformers chooses by the largest position among all rows that it is given."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    speeds = config["hidden_size"] // config["num_attention_heads"] // 2
    config["original_max_position_embeddings"] = ORIGINAL_CONTEXT
    config["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * speeds,
        "long_factor": [4.0] * speeds,
        "original_max_position_embeddings": ORIGINAL_CONTEXT,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", [*FAMILIES, "longrope"])
def test_rows_packed_or_padded_together_score_as_alone(
    family: str, base_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """No attention, no position and no target leaks from row to row: per-token log-probabilities agree."""
    base = with_longrope(base_model("tiny-phi3"), tmp_path / "base") if family == "longrope" else base_model(family)
    rows = inputs_of(write_job(tmp_path / "job", base)).train.rows
    model = load_base(base, "cpu", full=True)
    model.module.eval()

    def per_row(tokens_max: int, layout: Any) -> dict[int, Any]:
        scores: dict[int, Any] = {}
        for batch in micro_batches(rows, range(rows.count), tokens_max=tokens_max, layout=layout, device="cpu"):
            with torch.no_grad():
                hidden, targets = model.labelled_hidden(batch)
                values = log_probs(hidden, model.head_weight, targets, model.softcap)
            lengths = [int(rows.row(row)[1].sum()) for row in batch.rows]
            scores |= dict(zip(batch.rows, values.split(lengths), strict=True))
        return scores

    alone = per_row(1, "padded")
    assert sorted(alone) == list(range(rows.count))
    for layout in ("padded", "packed"):
        together = per_row(512, layout)
        worst = max((alone[row] - together[row]).abs().max().item() for row in alone)
        assert worst < 5e-5, (layout, worst)


def test_rows_longer_than_the_context_of_longropes_short_factors_are_refused(
    base_model: Callable[[str], Path], tmp_path: Path
) -> None:
    base = with_longrope(base_model("tiny-phi3"), tmp_path / "base")
    assert inputs_of(write_job(tmp_path / "as-long", base, max_seq_length=ORIGINAL_CONTEXT)).train.rows.count
    with pytest.raises(Failure, match=f"at most {ORIGINAL_CONTEXT}") as refused:
        inputs_of(write_job(tmp_path / "longer", base, max_seq_length=ORIGINAL_CONTEXT + 1))
    assert (refused.value.kind, refused.value.reason) == ("user", "INVALID_FIELD")
    assert [violation.field for violation in refused.value.violations] == ["max_seq_length"]


def test_accumulation_and_micro_batches_change_nothing_but_the_last_bits(make_job: Callable[..., Path]) -> None:
    plain = {"training": {"type": "lora", "r": 4, "dropout": 0.0}, "evaluations": 0}
    whole = trace(run_in_process(make_job("a", **plain)))
    split = trace(
        run_in_process(make_job("b", **plain, batch_size=2, gradient_accumulation_steps=2, micro_batch_tokens=64))
    )
    assert max(abs(a - b) for a, b in zip(whole, split, strict=True)) < 1e-5


def test_the_template_is_rendered_and_tokenised_as_transformers_does(
    make_job: Callable[..., Path], base_model: Any
) -> None:
    workdir = make_job()
    rows = inputs_of(workdir).train.rows
    tokenizer = AutoTokenizer.from_pretrained(base_model("tiny-llama"))
    lines = (workdir / "inputs" / "train.jsonl").read_text().splitlines()
    for index, line in enumerate(lines):
        expected = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=True, return_dict=False)
        assert rows.row(index)[0].tolist() == expected
