"""What a config says of its language part, and which configs describe more than one."""

from typing import Any

import pytest

from formats.prompts.faults import ModelFault
from formats.prompts.model_config import check_one_part, context_length, vocabulary_size

LLAMA = {"model_type": "llama", "hidden_size": 8, "vocab_size": 32, "max_position_embeddings": 64}
QUANTIZED = {"quantization_config": {"quant_method": "awq", "bits": 4}}
LONGROPE = {"rope_scaling": {"long_factor": [1.0]}, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("name", ["text_config", "vision_config", "audio_config", "llm_config", "thinker_config"])
def test_a_model_of_several_parts_is_refused_for_what_it_is(name: str) -> None:
    for config in ({name: LLAMA}, LLAMA | {name: {"hidden_size": 8}}):
        with pytest.raises(ModelFault, match=rf"config.json describes a model of several parts \({name}\)"):
            check_one_part(config)


@pytest.mark.parametrize("more", [{}, QUANTIZED, {"generation_config": {"top_p": 1}}, {"text_config": None}])
def test_a_language_model_alone_is_taken(more: dict[str, Any]) -> None:
    check_one_part(LLAMA | more)


def test_context_and_vocabulary() -> None:
    assert (context_length(LLAMA), vocabulary_size(LLAMA)) == (64, 32)
    assert (context_length({}), vocabulary_size({})) == (2048, None)
    assert context_length(LLAMA | LONGROPE) == 16


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "many", None])
def test_numbers_that_are_none_are_refused(value: object) -> None:
    with pytest.raises(ModelFault, match="vocab_size that is not a positive integer"):
        vocabulary_size({"vocab_size": value})
    with pytest.raises(ModelFault, match="max_position_embeddings that is not a positive integer"):
        context_length({"max_position_embeddings": value})
