"""Preferences as token rows: one question before both answers, labels on the answers alone, and pairs whole or left
out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from formats.prompts.model_folder import ModelFolder
from services.trainer.train.data.preparation.prepare import Dataset, DatasetRefusal, prepare_dataset
from services.trainer.train.data.tokens.prepare_settings import PrepareSettings


def pair(question: str, good: str, bad: str, **more: Any) -> dict[str, Any]:
    return {
        "input": {"messages": [{"role": "user", "content": question}]},
        "preferred_output": [{"role": "assistant", "content": good}],
        "non_preferred_output": [{"role": "assistant", "content": bad}],
        **more,
    }


def prepared(folder: ModelFolder, path: Path, rows: list[dict[str, Any]], **settings: Any) -> Dataset:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = {"max_seq_length": 128, "packing": True, "train_on_inputs": "auto", "template_date": "2024-07-26"}
    dataset = prepare_dataset(path, "train", folder, PrepareSettings(**{**wanted, **settings}), pack_rows=True)
    assert isinstance(dataset, Dataset)
    return dataset


def test_both_answers_follow_the_same_question(model_folder: ModelFolder, tmp_path: Path) -> None:
    rows = [pair("open the file", "opened", "no file of that name"), pair("read", "reading", "read it yourself")]
    dataset = prepared(model_folder, tmp_path / "rows.jsonl", rows)
    tokens = dataset.rows
    assert (dataset.format, tokens.rows, tokens.count, tokens.rows_per_example) == ("preference", 2, 4, 2)
    for first in (0, 2):
        (good, good_labels), (bad, bad_labels) = tokens.row(first), tokens.row(first + 1)
        start = int(good_labels.argmax())
        assert start == int(bad_labels.argmax())
        assert good[:start].tolist() == bad[:start].tolist()
        assert good_labels[start:].all()
        assert bad_labels[start:].all()
        assert "open the file" in model_folder.tokenizer.decode(good[:start].tolist()) or first == 2
    assert "no file of that name" in model_folder.tokenizer.decode(tokens.row(1)[0].tolist())


def test_a_pair_is_one_sequence_of_the_tokens_of_both(model_folder: ModelFolder, tmp_path: Path) -> None:
    rows = [pair(f"question {number}", "yes", "no " * number) for number in range(1, 5)]
    dataset = prepared(model_folder, tmp_path / "rows.jsonl", rows)
    lengths = dataset.rows.lengths
    assert tuple(dataset.sequences.groups) == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert dataset.sequences.token_counts.tolist() == [
        int(lengths[first] + lengths[first + 1]) for first in (0, 2, 4, 6)
    ]
    assert int(dataset.sequences.token_counts.sum()) == dataset.rows.token_count


@pytest.mark.parametrize("train_on_inputs", [True, False, "auto"])
def test_the_question_is_never_learned(model_folder: ModelFolder, tmp_path: Path, train_on_inputs: bool | str) -> None:
    path = tmp_path / "rows.jsonl"
    plain = prepared(model_folder, path, [pair("open", "yes", "no")]).rows
    asked = prepared(model_folder, path, [pair("open", "yes", "no")], train_on_inputs=train_on_inputs).rows
    assert asked.digest() == plain.digest()


def test_the_cut_keeps_the_question_and_leaves_out_pairs_with_nothing_to_compare(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    long = "word " * 200
    rows = [
        pair("short", "fine", long),
        pair(long, "fine", "not fine"),
        pair("short", f"{long} good", f"{long} bad"),
        pair("short", "same", "same"),
        pair("short", "fine", "not fine", weight=0),
    ]
    tokens = prepared(model_folder, tmp_path / "rows.jsonl", rows, max_seq_length=64).rows
    assert (tokens.rows, tokens.count, tokens.truncated_rows, tokens.skipped_rows) == (5, 2, 3, 4)
    assert (tokens.truncated_line, tokens.skipped_line) == (1, 2)
    (good, good_labels), (bad, bad_labels) = tokens.row(0), tokens.row(1)
    start = int(good_labels.argmax())
    assert len(bad) == 64
    assert good[:start].tolist() == bad[:start].tolist()
    assert bad_labels[start:].all()


def test_a_pair_has_one_weight(model_folder: ModelFolder, tmp_path: Path) -> None:
    rows = [pair("open", "yes", "no", weight=0.5), pair("close", "yes", "no")]
    tokens = prepared(model_folder, tmp_path / "rows.jsonl", rows).rows
    assert tokens.weights is not None
    assert tokens.weights.tolist() == [0.5, 0.5, 1.0, 1.0]


def test_an_answer_of_no_words_is_its_end_alone(model_folder: ModelFolder, tmp_path: Path) -> None:
    """To say nothing may be right, or wrong; it is told apart from every other answer."""
    tokens = prepared(model_folder, tmp_path / "rows.jsonl", [pair("open", "", "no"), pair("open", "yes", "")]).rows
    assert (tokens.count, tokens.skipped_rows) == (4, 0)
    assert [int(tokens.row(row)[1].sum()) for row in (0, 3)] == [1, 1]
    assert tokens.row(0)[0].tolist() == tokens.row(3)[0].tolist()


THOUGHT = [{"role": "assistant", "content": "yes", "reasoning": "because"}]
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("row", "places"),
    [
        (pair("q", "yes", "no", preferred_output=THOUGHT), ["$.preferred_output[0]"]),
        (pair("q", "yes", "no", non_preferred_output=THOUGHT), ["$.non_preferred_output[0]"]),
        (
            pair("q", "yes", "no", input={"messages": [{"role": "user", "content": "q"}], "tools": [TOOL]}),
            ["$.input.tools"],
        ),
        (
            pair(
                "q",
                "yes",
                "no",
                input={"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "21 degrees"}]},
            ),
            ["$.input.messages[1]"],
        ),
        ({"messages": [{"role": "user", "content": "q"}, *THOUGHT]}, ["$.messages[1]"]),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": [TOOL]},
            ["$.tools"],
        ),
    ],
)  # fmt: skip
def test_what_a_template_drops_is_said_once_and_where_it_stands(
    model_folder: ModelFolder, tmp_path: Path, row: dict[str, Any], places: list[str]
) -> None:
    source = (
        "{% for m in messages if m.role != 'tool' %}[{{ m.role }}]{{ m.content }}.{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    settings = PrepareSettings(max_seq_length=128, packing=True, train_on_inputs="auto", template_date="2024-07-26")
    refused = prepare_dataset(path, "train", replace(model_folder, template_source=source), settings, pack_rows=True)
    assert isinstance(refused, DatasetRefusal)
    assert [(error.line, error.path) for error in refused.errors] == [(1, place) for place in places]
    assert refused.error_count == 1
