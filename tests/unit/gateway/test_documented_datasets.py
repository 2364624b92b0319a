"""docs/datasets.md is true: its examples pass both checkers, its errors are the ones that are told,
its limits are the ones in force."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from formats import rows
from services.gateway.config import GatewaySettings
from services.gateway.files.line_check import LineCheck
from services.gateway.files.uploads import upload_limits
from services.scheduler.config import SchedulerSettings
from services.trainer.config import TrainerSettings
from services.trainer.train.analysis import row_preview as preview
from services.trainer.train.data.preparation import prepare
from services.trainer.train.data.tokens import chunks, row_reader, tokenized_file
from services.trainer.train.data.tokens.row_reader import RowReader
from services.trainer.train.disk import spill

TEXT = (Path(__file__).parents[3] / "docs" / "datasets.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(jsonl|text) ([\w ]+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
EXAMPLES = [
    (kind, content.encode()) for language, kind, content in BLOCKS if language == "jsonl" and "refused" not in kind
]
MODULES = (rows, chunks, prepare, preview, spill, row_reader, tokenized_file)


def read(folder: Path, content: bytes) -> tuple[RowReader, int]:
    path = folder / "rows"
    path.write_bytes(content)
    reader = RowReader(path)
    return reader, len(list(reader))


def test_every_format_has_an_example() -> None:
    assert {kind for kind, _ in EXAMPLES} == {"conversation", "instruction", "text", "preference", "feedback"}


@pytest.mark.parametrize(("kind", "content"), EXAMPLES)
def test_both_checkers_take_every_example(kind: str, content: bytes, tmp_path: Path) -> None:
    reader, count = read(tmp_path, content)
    assert (reader.errors.kept, reader.format, count) == ([], kind, content.count(b"\n"))
    settings = GatewaySettings(service_name="gateway")
    check = LineCheck(upload_limits(settings).dataset)
    check.feed(content)
    report = check.finish()
    assert (list(report.errors), report.format) == ([], kind)


def test_the_examples_use_every_feature(tmp_path: Path) -> None:
    used = rows.Features()
    for _, content in EXAMPLES:
        used.add_all(read(tmp_path, content)[0].features)
    assert all(getattr(used, name) for name in used.__slots__)
    assert all(f"`{name}`" in TEXT for name in used.__slots__)


@pytest.mark.parametrize("which", ["", " alpaca"])
def test_the_errors_shown_are_the_errors_told(which: str, tmp_path: Path) -> None:
    (refused,) = [content for language, kind, content in BLOCKS if (language, kind) == ("jsonl", f"refused{which}")]
    (shown,) = [content for language, kind, content in BLOCKS if (language, kind) == ("text", f"errors{which}")]
    reader, _ = read(tmp_path, refused.encode())
    told = [f"line {error.line}: {error.path}: expected {error.expectation}" for error in reader.errors.kept]
    assert sorted(told) == sorted(shown.splitlines())


def test_the_table_of_token_ids_is_a_sound_file(tmp_path: Path) -> None:
    found = re.findall(r"^\| `(\w+)`[^|]*\| `(\[.*?\])` \| `(\[.*?\])` \|$", TEXT, re.MULTILINE)
    columns: dict[str, Any] = {name: [json.loads(cell) for cell in cells] for name, *cells in found}
    assert list(columns) == ["input_ids", "attention_mask", "labels"]
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    reader, count = read(tmp_path, (tmp_path / "t.parquet").read_bytes())
    assert (reader.errors.kept, reader.format, count) == ([], "tokens", 2)


def test_every_limit_is_the_one_in_force() -> None:
    listed = re.findall(r"^\| `([A-Z_]+)` \| (\d+) \|", TEXT, re.MULTILINE)
    assert len(listed) == 47
    services = {
        "FINEMESH_GATEWAY_": GatewaySettings(service_name="gateway"),
        "FINEMESH_SCHEDULER_": SchedulerSettings(service_name="scheduler"),
        "FINEMESH_TRAINER_": TrainerSettings(service_name="trainer"),
    }
    for name, value in listed:
        prefix = next((prefix for prefix in services if name.startswith(prefix)), None)
        if prefix is not None:
            in_force = getattr(services[prefix], name.removeprefix(prefix).lower())
        else:
            in_force = next(getattr(module, name) for module in MODULES if hasattr(module, name))
        assert in_force == int(value), name
