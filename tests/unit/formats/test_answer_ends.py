"""Which tokens end an answer is read as transformers and vLLM read it, and adding some leaves the rest alone."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig

from formats.prompts.answer_ends import ENDS_MAX, GENERATION_CONFIG, add_ends, ends_of_adapter, ends_of_model
from formats.prompts.faults import ModelFault

IDS = st.lists(st.integers(0, 300), max_size=6)


def write(folder: Path, name: str, document: object) -> Path:
    (folder / name).write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 7]}, {"eos_token_id": 2}, {5, 7}),
        ({"eos_token_id": 5}, {"eos_token_id": 2}, {5}),
        # The file counts, also where it says nothing of ends.
        ({"temperature": 0.6}, {"eos_token_id": 2}, set()),
        (None, {"eos_token_id": [2, 3]}, {2, 3}),
        (None, {"eos_token_id": None}, set()),
    ],
)
def test_a_model_s_ends_are_those_of_its_generation_config_or_else_of_its_config(
    generation: dict[str, object] | None, config: dict[str, object], expected: set[int], tmp_path: Path
) -> None:
    write(tmp_path, "config.json", config)
    if generation is not None:
        write(tmp_path, GENERATION_CONFIG, generation)
    assert ends_of_model(tmp_path) == expected
    assert ends_of_adapter(tmp_path) == (expected if generation is not None else set())


def test_it_is_read_as_transformers_does(tmp_path: Path) -> None:
    LlamaConfig(eos_token_id=[2, 9]).save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[2, 9, 11], pad_token_id=0).save_pretrained(tmp_path)
    assert ends_of_model(tmp_path) == set(GenerationConfig.from_pretrained(tmp_path).eos_token_id)


@given(before=st.none() | st.integers(0, 300) | IDS, more=IDS)
def test_added_ends_stand_behind_the_listed_ones_and_the_rest_stays(
    before: int | list[int] | None, more: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("model")
    rest = {"temperature": 0.6, "transformers_version": "5.0.0"}
    write(folder, GENERATION_CONFIG, {**rest, "eos_token_id": before})
    listed = [] if before is None else before if isinstance(before, list) else [before]
    for _ in range(2):
        # The second time adds nothing.
        add_ends(folder, more)
        after = json.loads((folder / GENERATION_CONFIG).read_text())
        assert after.pop("eos_token_id")[: len(listed)] == listed
        assert after == rest
        assert ends_of_model(folder) == set(listed) | set(more)


def test_ends_are_added_where_there_was_no_file(tmp_path: Path) -> None:
    add_ends(tmp_path, {7, 3})
    assert json.loads((tmp_path / GENERATION_CONFIG).read_text()) == {"eos_token_id": [3, 7]}


@pytest.mark.parametrize("wrong", ["2", True, -1, [2, "3"], [2.5], {"id": 2}, list(range(ENDS_MAX + 1))])
def test_what_is_no_list_of_token_ids_is_named(wrong: object, tmp_path: Path) -> None:
    write(tmp_path, GENERATION_CONFIG, {"eos_token_id": wrong})
    for read in (ends_of_model, ends_of_adapter):
        with pytest.raises(ModelFault, match=r"generation_config\.json holds an eos_token_id that is neither"):
            read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b'{"eos_token_id": '])
def test_a_broken_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / GENERATION_CONFIG).write_bytes(content)
    with pytest.raises(ModelFault, match=r"generation_config\.json cannot be read"):
        ends_of_adapter(tmp_path)
