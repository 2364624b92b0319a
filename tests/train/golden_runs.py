"""Short runs whose losses are kept in tests/assets/losses: every recipe's shape, as an adapter, with full weights, and
by preferences.

They stand on nothing that changes from machine to machine: weights and rows come from seeds, and the tokenizer is a
list of words. `python -m tests.train.golden_runs` records them anew, which is right only when the arithmetic was meant
to change.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read when torch is loaded: spinning workers crawl when other processes want the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from services.trainer.train.loop.run import train
from services.trainer.train.recipes.model_shapes import RECIPES, Recipe
from services.trainer.train.settings.spec import resolve_paths
from services.trainer.train.settings.spec_json import load_spec

Trace = dict[str, list[float]]

FOLDER = Path(__file__).parents[1] / "assets" / "losses"
_LORA = {"type": "lora", "r": 4}
# No dropout: its masks follow how rows are laid out, which is chosen by device. 24 rows in steps of at most 4, twice.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"training": _LORA, "learning_rate": 5e-3, "gradient_accumulation_steps": 2, "batch_size": 2},
    "full": {
        "training": {"type": "full"}, "learning_rate": 1e-3, "batch_size": 4, "packing": True, "max_seq_length": 96,
        "schedule": {"type": "linear", "min_lr_ratio": 0.1},
    },
    "dpo": {
        "training": _LORA, "learning_rate": 5e-3, "method": "dpo", "dpo": {"beta": 0.3, "rpo_alpha": 0.5},
        "batch_size": 4,
    },
    "kto": {
        "training": _LORA, "learning_rate": 5e-3, "method": "kto", "kto": {"beta": 0.3, "undesirable_weight": 1.5},
        "batch_size": 4,
    },
}  # fmt: skip
ROWS = 24
VALIDATION_ROWS = 6
_SPECIAL = ("<pad>", "<begin>", "<end>", "<user>", "<assistant>")
_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
_DIGITS = 6


def golden_file(recipe: Recipe) -> Path:
    return FOLDER / f"{recipe.name}.json"


def make_base(recipe: Recipe, folder: Path) -> None:
    """The recipe's shape with random weights; it has been trained on nothing."""
    folder.mkdir(parents=True)
    torch.manual_seed(recipe.seed)
    config = AutoConfig.for_model(
        recipe.model_type, vocab_size=recipe.vocabulary, pad_token_id=0, bos_token_id=1, eos_token_id=2, **recipe.config
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(str(folder))
    words = [*_SPECIAL, *(f"w{number}" for number in range(len(_SPECIAL), recipe.vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "chat_template.jinja").write_text(_TEMPLATE)


def run(recipe: Recipe, method: str, base: Path, workdir: Path, **changes: Any) -> Trace:
    """Losses and gradient norms of all steps of 2 epochs, and the losses of the evaluations."""
    workdir.mkdir(parents=True)
    _write_rows(recipe, method, workdir / "train.jsonl", ROWS, seed=1)
    _write_rows(recipe, method, workdir / "held.jsonl", VALIDATION_ROWS, seed=2)
    spec = {
        "job_id": "ft-golden",
        "base_model": {"directory": str(base), "id": recipe.name, "revision": "rv_golden"},
        "train_file": "train.jsonl",
        "validation_file": "held.jsonl",
        "epochs": 2,
        "evaluations": 1,
        "packing": False,
        "warmup_ratio": 0.1,
        "weight_decay": 0.1,
        "seed": 3,
        **METHODS[method],
        **changes,
    }
    (workdir / "spec.json").write_text(json.dumps(spec))
    events: list[dict[str, Any]] = []

    def hear(kind: str, /, **fields: Any) -> None:
        events.append({"type": kind, **fields})

    train(resolve_paths(load_spec(workdir / "spec.json"), workdir), workdir, hear, lambda: False)
    steps = [step for event in events if event["type"] == "progress" for step in event["steps"]]
    return {
        "loss": [step["loss"] for step in steps],
        "grad_norm": [step["grad_norm"] for step in steps],
        "validation_loss": [event["loss"] for event in events if event["type"] == "evaluation"],
    }


def furthest(found: Trace, golden: Trace) -> float:
    """The largest difference relative to the recorded value; infinite when there are more or fewer of them."""
    if {kind: len(values) for kind, values in found.items()} != {kind: len(values) for kind, values in golden.items()}:
        return float("inf")
    return max(
        abs(one - other) / abs(other)
        for kind, values in found.items()
        for one, other in zip(values, golden[kind], strict=True)
    )


def _write_rows(recipe: Recipe, method: str, path: Path, count: int, seed: int) -> None:
    """Rows of very different lengths, whose answers repeat their questions: as a conversation, as prompt and
    completion, and beside an answer of other words, and with a thumb."""
    dice = np.random.default_rng(seed)
    lines: list[dict[str, Any]] = []
    for _ in range(count):
        words = [f"w{number}" for number in dice.integers(len(_SPECIAL), recipe.vocabulary, int(dice.integers(4, 60)))]
        asked, answered, other = " ".join(words), " ".join(words[: 1 + len(words) // 2]), " ".join(words[::-3])
        question, answer = {"role": "user", "content": asked}, {"role": "assistant", "content": answered}
        if method == "full":
            lines.append({"prompt": asked, "completion": f" {answered}"})
        elif method == "lora":
            lines.append({"messages": [question, answer]})
        elif method == "kto":
            good = len(lines) % 3 != 0
            said = answer if good else {"role": "assistant", "content": other}
            lines.append({"prompt": [question], "completion": [said], "label": good})
        else:
            worse = {"role": "assistant", "content": other}
            lines.append(
                {"input": {"messages": [question]}, "preferred_output": [answer], "non_preferred_output": [worse]}
            )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def record(folder: Path, say: Callable[[str], object], **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        for recipe in RECIPES.values():
            base = Path(name) / recipe.name
            make_base(recipe, base)
            traces = {
                method: run(recipe, method, base, Path(name) / f"{recipe.name}-{method}", **changes)
                for method in METHODS
            }
            rounded = {
                method: {kind: [round(value, _DIGITS) for value in values] for kind, values in trace.items()}
                for method, trace in traces.items()
            }
            (folder / golden_file(recipe).name).write_text(json.dumps(rounded, indent=1) + "\n")
            ends = ", ".join(f"{method} {trace['loss'][-1]}" for method, trace in rounded.items())
            say(f"{recipe.name}: the last losses are {ends}\n")


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    record(FOLDER, sys.stdout.write)
