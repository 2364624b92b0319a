"""What a look at an import finds with the libraries that serve it, in this process: it has torch already."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from formats.prompts.model_folder import read_model_folder
from services.inference.engines.checks import serving_check
from services.inference.engines.checks.finding import Finding
from services.inference.engines.checks.main import check
from tests.contract.engines.tiny_llama import build_base
from tests.harness.tokenizer_kinds import KINDS, write_kind

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
TEMPLATE = "the chat template in chat_template.jinja"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("whole"))


def looked_at(folder: Path, *, run_bytes_max: int = 1 << 30) -> bool:
    return check({"folder": str(folder), "full": True, "run_bytes_max": run_bytes_max, "prompts_s_max": 120})


def config(**changed: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return rewrite


def text(name: str, content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(content)

    return write


def test_a_sound_model_is_run_unless_it_is_large(whole: Path) -> None:
    assert looked_at(whole)
    assert not looked_at(whole, run_bytes_max=1000)


@pytest.mark.parametrize(
    ("spoil", "file", "problem"),
    [
        (config(num_hidden_layers=1), CONFIG, "has 1 layers, and the weights hold model.layers.1."),
        (config(num_hidden_layers=3), CONFIG, "lack model.layers.2.input_layernorm.weight"),
        (config(intermediate_size=128), CONFIG, r"mlp.down_proj.weight .\[128, 256\] in the weights, \[128, 128\] by"),
        (config(model_type="no-such-model"), CONFIG, "cannot be used"),
        (config(vocab_size=100), TOKENIZER, "the model has 100 tokens"),
        (weights(lambda found: found.pop("model.norm.weight")), CONFIG, "lack model.norm.weight"),
        (weights(lambda found: found["model.norm.weight"].fill_(torch.inf)), WEIGHTS, "model.norm.weight holds values"),
        (text(TOKENIZER, '{"version": "1.0"'), TOKENIZER, "is no tokenizer"),
        (text("chat_template.jinja", "{% for m in messages %}"), TEMPLATE, "Unexpected end of template"),
        (text("chat_template.jinja", "{{ raise_exception('never') }}"), TEMPLATE, "never"),
        (text("chat_template.jinja", "{{ ''.__class__.__mro__ }}"), TEMPLATE, "is unsafe"),
    ],
)
@pytest.mark.parametrize("run_bytes_max", [1 << 30, 1000], ids=["run", "large"])
def test_what_cannot_serve_is_named(
    whole: Path, tmp_path: Path, spoil: Callable[[Path], None], file: str, problem: str, run_bytes_max: int
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    with pytest.raises(Finding, match=problem) as found:
        looked_at(tmp_path, run_bytes_max=run_bytes_max)
    assert found.value.file == file


def test_a_template_in_a_file_of_its_own_wins(whole: Path, tmp_path: Path) -> None:
    """So that one that is given at an import is the one that is checked and served."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ raise_exception('its own') }}"}))
    text("chat_template.jinja", "{{ messages[0]['content'] }}")(tmp_path)
    assert looked_at(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "{{ messages[0]['content'] }}"


def test_what_only_a_run_finds_is_named(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    weights(lambda found: found["lm_head.weight"].fill_(3e38))(tmp_path)
    with pytest.raises(Finding, match="infinite or not numbers") as found:
        looked_at(tmp_path, run_bytes_max=1 << 30)
    assert found.value.file == "the model"


def test_a_tokenizer_that_is_read_in_two_ways_is_refused_with_both_readings(tmp_path: Path) -> None:
    trained, served = KINDS["Llama 3"].made(), KINDS["Qwen"].made()
    folder = write_kind(KINDS["Llama 3"], tmp_path)
    trained.save(str(folder / TOKENIZER))
    read = read_model_folder(folder)
    words = r"is read in two ways: token 0 of 'a <\|eot_id\|>' is 66 \('a'\) by training and 67 \('a'\) by serving"
    with pytest.raises(Finding, match=words):
        serving_check.compare(read.tokenizer, PreTrainedTokenizerFast(tokenizer_object=served), "a <|eot_id|>")
    serving_check.check_as_served(read, "<|begin_of_text|>a <|eot_id|>")
