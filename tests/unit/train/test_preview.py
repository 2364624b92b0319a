"""A preview shows what training sees: the very ids and labels, the sampled rows, and what truncation cut."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.prompts.model_folder import ModelFolder
from services.trainer.config import TrainerSettings
from services.trainer.datasets.convert import preview_to_proto
from services.trainer.train.analysis.main import answer_request
from services.trainer.train.data.preparation.prepare import Dataset, prepare_dataset
from services.trainer.train.data.tokens.prepare_settings import PrepareSettings

TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"answer {number}", "weight": number % 2},
            {"role": "user", "content": "and?"},
            {"role": "assistant", "content": "that is all " * number},
        ],
        "weight": 1 + number,
    }
    for number in range(1, 12)
]


def ask(folder: Path, path: Path, rows: list[Any], preview: dict[str, Any], **request: Any) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {"base_model": {"directory": str(folder)}, "train_file": str(path), "preview": preview, **request}
    return answer_request(json.dumps(document).encode())


def test_rows_are_those_of_the_training(model_directory: Path, model_folder: ModelFolder, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    answer = ask(model_directory, path, TALKS, {"rows": 4, "tokens_shown": 8192}, max_seq_length=40)
    assert answer["ok"], answer
    preview = answer["preview"]
    assert (preview["format"], preview["rows"], preview["max_seq_length"]) == ("conversation", 11, 40)
    assert preview["features"]["message_weights"]
    assert preview["features"]["sample_weights"]
    assert [row["line"] for row in preview["sampled"]] == [1, 3, 6, 9]

    settings = PrepareSettings(max_seq_length=40, packing=False, train_on_inputs="auto", template_date="2024-07-26")
    dataset = prepare_dataset(path, "train", model_folder, settings, pack_rows=False)
    assert isinstance(dataset, Dataset)
    weights = dataset.rows.weights
    assert weights is not None
    for row in preview["sampled"]:
        ids, labelled = dataset.rows.row(row["line"] - 1)
        assert row["input_ids"] == ids.tolist()
        assert row["labels"] == np.where(labelled, ids, -100).tolist()
        assert row["weight"] == weights[row["line"] - 1]
        spans = [range(start, end) for start, end in row["trained_spans"]]
        assert [index for span in spans for index in span] == np.flatnonzero(labelled).tolist()
        assert "".join(row["tokens"]) == model_folder.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        assert (row["token_count"], row["trained_token_count"]) == (len(ids), int(labelled.sum()))
    last = preview["sampled"][-1]
    assert last["truncated_token_count"] > 0
    assert last["truncated_text"].startswith(("that", " that", "is", " is", "all", " all"))


def test_shown_tokens_are_bounded_and_counts_are_not(model_directory: Path, tmp_path: Path) -> None:
    answer = ask(model_directory, tmp_path / "t.jsonl", [{"text": "word " * 50}], {"rows": 50, "tokens_shown": 3})
    (row,) = answer["preview"]["sampled"]
    assert (len(row["input_ids"]), len(row["labels"]), len(row["tokens"])) == (3, 3, 3)
    assert row["trained_spans"] == [[1, 3]] or row["trained_spans"] == [(1, 3)]
    assert row["token_count"] > 50
    assert not row["skipped"]


def test_both_answers_of_a_preference_are_shown(model_directory: Path, tmp_path: Path) -> None:
    choice = {
        "input": {"messages": [{"role": "user", "content": "q"}]},
        "preferred_output": [{"role": "assistant", "content": "good"}],
        "non_preferred_output": [{"role": "assistant", "content": "bad"}],
    }
    answer = ask(model_directory, tmp_path / "t.jsonl", [choice], {})
    assert [row["part"] for row in answer["preview"]["sampled"]] == ["preferred", "non_preferred"]
    trained = ["".join(row["tokens"][slice(*row["trained_spans"][0])]) for row in answer["preview"]["sampled"]]
    assert trained == ["good<|end|>", "bad<|end|>"]


def test_a_row_without_an_answer_is_shown_as_skipped(model_directory: Path, tmp_path: Path) -> None:
    row = {"prompt": "many words " * 30, "completion": "x"}
    answer = ask(model_directory, tmp_path / "t.jsonl", [row], {}, max_seq_length=16)
    (shown,) = answer["preview"]["sampled"]
    assert (shown["skipped"], shown["trained_spans"], shown["token_count"]) == (True, [], 16)


def test_a_broken_row_is_refused_with_its_line(model_directory: Path, tmp_path: Path) -> None:
    answer = ask(model_directory, tmp_path / "t.jsonl", [{"text": "x"}, {"text": 3}], {})
    assert (answer["ok"], answer["errors"][0]["line"], answer["errors"][0]["path"]) == (False, 2, "$.text")
    tools = [{"type": "function", "function": {"name": "f"}}]
    answer = ask(model_directory, tmp_path / "t.jsonl", [{**TALKS[0], "tools": tools}], {})
    assert "takes tools" in answer["errors"][0]["expected"]
    assert ask(model_directory, tmp_path / "t.jsonl", TALKS, {"rows": 51})["violations"][0]["field"] == "preview.rows"


@pytest.mark.parametrize("kind", ["text", "preference"])
def test_the_largest_preview_fits_into_an_answer(model_directory: Path, tmp_path: Path, kind: str) -> None:
    """Of an agent, and into a message of the mesh. Rows share what may be shown, and counts say how much there is."""
    folder = tmp_path / "long"
    shutil.copytree(model_directory, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 16384}))
    words = "de f( " * 4000
    row: dict[str, Any] = {"text": words}
    if kind == "preference":
        row = {
            "input": {"messages": [{"role": "user", "content": "q"}]},
            "preferred_output": [{"role": "assistant", "content": words}],
            "non_preferred_output": [{"role": "assistant", "content": words + "x"}],
        }
    answer = ask(folder, tmp_path / "rows.jsonl", [row] * 50, {"rows": 50, "tokens_shown": 8192}, max_seq_length=16384)
    assert answer["ok"], answer
    assert len(json.dumps(answer)) < TrainerSettings().analysis_answer_bytes_max
    assert preview_to_proto(answer["preview"], "auto").ByteSize() < TrainerSettings().message_size_bytes_max
    shown = answer["preview"]["sampled"]
    assert len(shown) == (50 if kind == "text" else 100)
    assert all(0 < len(each["input_ids"]) < each["token_count"] for each in shown)
    # Few rows are not cut by what others might need.
    few = ask(folder, tmp_path / "rows.jsonl", [row], {"rows": 1, "tokens_shown": 8192}, max_seq_length=16384)
    assert {len(each["input_ids"]) for each in few["preview"]["sampled"]} == {8192}


def test_what_a_template_says_is_passed_on_in_bounds(model_directory: Path, tmp_path: Path) -> None:
    folder = tmp_path / "talkative"
    shutil.copytree(model_directory, folder)
    source = "{% if messages | length > 1 %}{{ raise_exception('no ' * 1000000) }}{% endif %}" + (
        "{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(source)
    answer = ask(folder, tmp_path / "rows.jsonl", TALKS, {"rows": 1})
    assert (answer["reason"], answer["error_count"]) == ("DATASET_INVALID", 1)
    assert len(json.dumps(answer)) < 4096
