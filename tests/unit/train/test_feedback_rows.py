"""Feedback as token rows: labels on the answer alone, a negative weight for thumbs down, tokens counted once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from formats.prompts.model_folder import ModelFolder
from services.trainer.train.data.preparation.prepare import Dataset, DatasetRefusal, prepare_dataset
from services.trainer.train.data.tokens.prepare_settings import PrepareSettings
from services.trainer.train.settings.failures import Failure


def judged(question: str, answer: str, label: bool, **more: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
        "label": label,
        **more,
    }


def plain(question: str, answer: str, label: bool) -> dict[str, Any]:
    return {"prompt": question, "completion": answer, "label": label}


def prepared(folder: ModelFolder, path: Path, rows: list[dict[str, Any]], **settings: Any) -> Dataset | DatasetRefusal:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = {"max_seq_length": 128, "packing": False, "train_on_inputs": True, "template_date": "2024-07-26"}
    return prepare_dataset(path, "train", folder, PrepareSettings(**{**wanted, **settings}), pack_rows=True)


def test_rows_are_those_of_the_same_examples_without_a_label(model_folder: ModelFolder, tmp_path: Path) -> None:
    """The answer alone is learned, whatever is said about inputs; both forms may stand in one file."""
    rows = [judged("read", "reading", True, weight=2), plain("open", " opened", False), judged("go", "gone", False)]
    found = prepared(model_folder, tmp_path / "rows.jsonl", rows)
    assert isinstance(found, Dataset)
    talk = [{"messages": [*row["prompt"], *row["completion"]]} for row in (rows[0], rows[2])]
    text = [{key: rows[1][key] for key in ("prompt", "completion")}]
    for indices, alike in (((0, 2), talk), ((1,), text)):
        expected = prepared(model_folder, tmp_path / "alike.jsonl", alike, train_on_inputs=False)
        assert isinstance(expected, Dataset)
        for number, index in enumerate(indices):
            for one, other in zip(found.rows.row(index), expected.rows.row(number), strict=True):
                assert one.tolist() == other.tolist()
    assert found.rows.weights is not None
    assert found.rows.weights.tolist() == [2.0, -1.0, -1.0]
    assert (found.format, found.rows.count, found.rows.rows_per_example, found.sequences.count) == ("feedback", 3, 1, 3)
    assert found.features.used() == ("sample_weights", "thumbs_down", "thumbs_up")


def test_a_file_with_thumbs_of_one_kind_is_refused(model_folder: ModelFolder, tmp_path: Path) -> None:
    refused = prepared(model_folder, tmp_path / "rows.jsonl", [judged("a", "b", True), plain("c", "d", True)])
    assert isinstance(refused, DatasetRefusal)
    assert [(error.line, error.path) for error in refused.errors] == [(0, "$.label")]


def test_a_base_without_a_template_takes_text_and_no_messages(model_folder: ModelFolder, tmp_path: Path) -> None:
    bare = replace(model_folder, template_source=None)
    rows = [plain("a", "b", True), plain("c", "d", False)]
    assert isinstance(prepared(bare, tmp_path / "rows.jsonl", rows), Dataset)
    with pytest.raises(Failure, match="no chat template"):
        prepared(bare, tmp_path / "rows.jsonl", [*rows, judged("e", "f", True)])


def test_what_a_template_drops_is_said_where_it_stands(model_folder: ModelFolder, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    rows = [judged("a", "b", True), judged("c", "d", False, tools=[tool])]
    refused = prepared(model_folder, tmp_path / "rows.jsonl", rows)
    assert isinstance(refused, DatasetRefusal)
    assert [(error.line, error.path) for error in refused.errors] == [(2, "$.tools")]
