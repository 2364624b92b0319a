"""A base model with a hole in it, or an adapter where the engine cannot train one: refused with the file, the tensor or
the setting, before the first step. Nothing may be drawn at random in place of weights that are not there.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.trainer.train.settings.failures import Failure
from tests.train.test_bad_input import Make, run, with_base

WEIGHTS = "model.safetensors"
NORM = "model.layers.0.input_layernorm.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


def with_tensors(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def rewrite(base: Path) -> None:
        tensors = load_file(base / WEIGHTS)
        change(tensors)
        save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})

    return rewrite


def cut(base: Path) -> None:
    path = base / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def cut_in_the_header(base: Path) -> None:
    path = base / WEIGHTS
    path.write_bytes(path.read_bytes()[:100])


def without_a_tensor(tensors: dict[str, Any]) -> None:
    del tensors[QUERY]


def of_another_shape(tensors: dict[str, Any]) -> None:
    tensors[QUERY] = tensors[QUERY][:-1].contiguous()


def with_one_nan(tensors: dict[str, Any]) -> None:
    tensors[QUERY][3, 4] = math.nan


def with_two_infinities(tensors: dict[str, Any]) -> None:
    """Of both signs, in a tensor that is not multiplied before the first layer's end."""
    tensors[NORM][0], tensors[NORM][1] = math.inf, -math.inf


@pytest.mark.parametrize("training", [{"type": "lora", "r": 4}, {"type": "full"}], ids=["lora", "full"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_tensors(without_a_tensor), QUERY),
        (with_tensors(of_another_shape), QUERY),
        (with_tensors(with_one_nan), QUERY),
        (with_tensors(with_two_infinities), NORM),
        (cut, WEIGHTS),
        (cut_in_the_header, WEIGHTS),
    ],
    ids=["missing", "shape", "nan", "infinite", "cut", "header"],
)
def test_a_base_with_a_hole_is_refused_by_name(
    make_job: Make, change: Callable[[Path], None], words: str, training: dict[str, Any]
) -> None:
    with pytest.raises(Failure) as caught:
        run(workdir := with_base(make_job(training=training), change))
    assert (caught.value.kind, caught.value.reason) == ("user", "MODEL_INVALID")
    assert words in caught.value.message
    assert not list(workdir.glob("checkpoints/*"))


def untied(base: Path) -> None:
    tensors = load_file(base / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    config = base / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))


@pytest.mark.parametrize("modules", [["lm_head", "q_proj"], ["embed_tokens", "q_proj"]], ids=["head", "embeddings"])
@pytest.mark.parametrize("change", [lambda _: None, untied], ids=["tied", "untied"])
def test_an_adapter_on_the_vocabulary_is_refused(
    make_job: Make, change: Callable[[Path], None], modules: list[str]
) -> None:
    """The head is read past its own forward pass, so an adapter there would be shipped untrained; one on the embeddings
    that are also the head would change the head of the merged model alone."""
    job = make_job(training={"type": "lora", "r": 4, "target_modules": modules})
    with pytest.raises(Failure) as caught:
        run(with_base(job, change))
    assert (caught.value.kind, caught.value.reason) == ("user", "INVALID_FIELD")
    assert [violation.field for violation in caught.value.violations] == ["training.target_modules"]
    assert modules[0] in caught.value.message
    assert "q_proj" not in caught.value.message


def test_a_whole_base_of_large_numbers_is_taken(make_job: Make) -> None:
    """Whose sums overflow, though no number does."""

    def large(tensors: dict[str, Any]) -> None:
        tensors["model.embed_tokens.weight"] = torch.full_like(tensors["model.embed_tokens.weight"], 3e38)
        tensors["model.embed_tokens.weight"][1::2] = 1.0

    with pytest.raises(Failure) as caught:
        run(with_base(make_job(evaluations=0, validation_file=None), with_tensors(large)))
    assert "embed_tokens" not in caught.value.message
