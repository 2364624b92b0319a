"""The rows that every side of the training benchmark reads: the same tokens by the engine's own reading,
or no figure."""

import json
from pathlib import Path

import pytest

from bench.train import bench_rows
from bench.train.bench_rows import END_ID, IGNORED, Row
from bench.train.buckets import buckets
from bench.train.shapes import CONTEXT_LENGTH, HELD_OUT, LENGTH_MEDIAN, SHAPES
from services.trainer.train.data.preparation.prepare import Dataset, prepare_dataset
from services.trainer.train.data.tokens.base_tokenizer import open_model_folder
from services.trainer.train.data.tokens.prepare_settings import PrepareSettings

SMALL = SHAPES["1M"]


def test_rows_are_the_same_at_every_look_and_held_out_ones_are_others() -> None:
    assert bench_rows.training_rows(SMALL, 8) == bench_rows.training_rows(SMALL, 8)
    assert bench_rows.training_rows(SMALL, 16)[:8] == bench_rows.training_rows(SMALL, 8)
    assert bench_rows.training_rows(SMALL, HELD_OUT) != bench_rows.held_out_rows(SMALL)


def test_lengths_spread_around_the_median_and_only_answers_are_labelled() -> None:
    rows = bench_rows.training_rows(SMALL, 400)
    lengths = sorted(len(row.ids) for row in rows)
    assert 0.8 * LENGTH_MEDIAN < lengths[200] < 1.25 * LENGTH_MEDIAN
    assert lengths[-1] <= CONTEXT_LENGTH
    assert lengths[-1] > 3 * lengths[200]
    for row in rows:
        assert row.labels == [IGNORED] * row.prompt_length + row.ids[row.prompt_length :]
        assert 0 < row.prompt_length < len(row.ids)
        assert row.ids.count(END_ID) == 1
        assert row.ids[-1] == END_ID


def test_the_answers_of_a_pair_follow_one_prompt_and_differ() -> None:
    for pair in bench_rows.training_pairs(SMALL, 50):
        assert bench_rows.prompt_text(pair.preferred) == bench_rows.prompt_text(pair.other)
        assert bench_rows.answer_text(pair.preferred) != bench_rows.answer_text(pair.other)
        assert len(pair.other.ids) <= CONTEXT_LENGTH


def test_the_engine_reads_the_very_ids_from_the_text_of_rows(tmp_path: Path) -> None:
    rows = bench_rows.training_rows(SMALL, 12)
    bench_rows.write_rows(rows, tmp_path / "train.jsonl")
    assert engine_rows(tmp_path) == [(row.ids, row.labels) for row in rows]


def test_the_engine_reads_the_very_ids_from_the_text_of_pairs(tmp_path: Path) -> None:
    pairs = bench_rows.training_pairs(SMALL, 12)
    bench_rows.write_pairs(pairs, tmp_path / "train.jsonl")
    assert engine_rows(tmp_path) == [(row.ids, row.labels) for row in bench_rows.rows_of(pairs)]


def test_other_tokens_than_the_rows_have_are_refused() -> None:
    rows = bench_rows.training_rows(SMALL, 3)
    tokens, labels = bench_rows.tokens_in(rows), bench_rows.labels_in(rows)
    bench_rows.require_same_tokens("a side", rows, tokens=tokens)
    bench_rows.require_same_tokens("a side", rows, tokens=tokens, labels=labels)
    with pytest.raises(ValueError, match="a side reads other tokens"):
        bench_rows.require_same_tokens("a side", rows, tokens=tokens - 1)
    with pytest.raises(ValueError, match="a side reads other tokens"):
        bench_rows.require_same_tokens("a side", rows, tokens=tokens, labels=labels + 1)


def test_a_bucket_keeps_its_limit_with_the_padding_and_no_row_is_lost() -> None:
    rows = bench_rows.training_rows(SMALL, 60)
    made = buckets(rows, 1000)
    assert sorted(id(row) for bucket in made for row in bucket) == sorted(id(row) for row in rows)
    assert all(len(bucket) * max(len(row.ids) for row in bucket) <= 1000 for bucket in made)
    widths = [len(bucket[0].ids) for bucket in made]
    assert widths == sorted(widths, reverse=True)


def test_a_row_beyond_the_limit_has_a_bucket_to_itself() -> None:
    long, short = Row(ids=[5] * 30, labels=[5] * 30), Row(ids=[5] * 4, labels=[5] * 4)
    assert buckets([short, long, short], 10) == [[long], [short, short]]


def engine_rows(folder: Path) -> list[tuple[list[int], list[int]]]:
    """Ids and labels as the engine makes them of the file, in its order."""
    bench_rows.write_tokenizer(SMALL.vocabulary, CONTEXT_LENGTH, folder)
    config = {"model_type": "llama", "vocab_size": SMALL.vocabulary, "max_position_embeddings": CONTEXT_LENGTH}
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": END_ID, "bos_token_id": 1}))
    settings = PrepareSettings(
        max_seq_length=CONTEXT_LENGTH, packing=False, train_on_inputs="auto", template_date="2024-07-26"
    )
    dataset = prepare_dataset(folder / "train.jsonl", "train", open_model_folder(folder), settings, pack_rows=True)
    assert isinstance(dataset, Dataset)
    read = []
    for number in range(dataset.rows.count):
        ids, labelled = dataset.rows.row(number)
        read.append((ids.tolist(), [token if chosen else IGNORED for token, chosen in zip(ids, labelled, strict=True)]))
    return read
