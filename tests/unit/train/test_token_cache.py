"""Prepared files are kept and taken again by all that decides them; what is torn, damaged or of other code is made
anew."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from formats.prompts.model_folder import ModelFolder
from services.trainer.train.data.preparation import prepare
from services.trainer.train.data.preparation import token_cache as shards
from services.trainer.train.data.preparation.prepare import Dataset, prepare_dataset
from services.trainer.train.data.tokens import tokenized_file
from services.trainer.train.data.tokens.base_tokenizer import open_model_folder
from services.trainer.train.data.tokens.prepare_settings import PrepareSettings
from services.trainer.train.disk import spill
from services.trainer.train.disk.durable import UNFINISHED_PREFIX
from services.trainer.train.settings.directories import Directories
from services.trainer.train.settings.failures import Failure

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def every_file_is_worth_keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CACHED_FILE_BYTES_MIN", 0)


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were tokenised, not taken from the cache."""
    names: list[str] = []

    def noted(path: Path, name: str, *rest: Any) -> Any:
        names.append(name)
        return tokenized_file.tokenize_file(path, name, *rest)

    monkeypatch.setattr(prepare, "tokenize_file", noted)
    return names


def settings_for(cache: Path | None, **changes: Any) -> PrepareSettings:
    wanted = {"max_seq_length": 64, "packing": True, "train_on_inputs": "auto", "template_date": "2024-07-26"}
    return PrepareSettings(**{**wanted, **changes}, directories=Directories(cache=cache))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    rows = [
        {"prompt": "ask " * (n % 9), "completion": f"say {n} " * (n % 5 + 1), "weight": 1 + n % 2} for n in range(80)
    ]
    return write(tmp_path / "train.jsonl", rows)


def made(path: Path, folder: ModelFolder, settings: PrepareSettings, *, pack_rows: bool = True) -> dict[str, Any]:
    """All that is known of the data, in plain values."""
    dataset = prepare_dataset(path, "train", folder, settings, pack_rows=pack_rows)
    assert isinstance(dataset, Dataset)
    rows = dataset.rows
    return {
        "ids": rows.ids.tolist(),
        "labelled": rows.labelled.tolist(),
        "weights": None if rows.weights is None else rows.weights.tolist(),
        "counts": (rows.rows, rows.count, rows.truncated_rows, rows.skipped_rows, rows.longest_row_tokens),
        "width": rows.rows_per_example,
        "groups": list(dataset.sequences.groups),
        "token_counts": dataset.sequences.token_counts.tolist(),
        "digest": dataset.sequences.digest,
        "sha256": dataset.sha256,
        "format": dataset.format,
        "features": asdict(dataset.features),
    }


@pytest.mark.parametrize("pack_rows", [True, False])
def test_what_was_kept_is_what_would_be_made(
    train_file: Path, model_folder: ModelFolder, tmp_path: Path, tokenized: list[str], pack_rows: bool
) -> None:
    """Also for whoever wants the other layout of the same rows: what analyses pack, a validation does not."""
    plain = made(train_file, model_folder, settings_for(None), pack_rows=pack_rows)
    settings = settings_for(tmp_path / "cache")
    first = made(train_file, model_folder, settings, pack_rows=not pack_rows)
    again = made(train_file, model_folder, settings, pack_rows=pack_rows)
    assert again == plain
    assert first["digest"] != plain["digest"]
    assert tokenized == ["train", "train"], "once without the cache, once for it"


def test_pairs_are_kept_as_pairs(model_folder: ModelFolder, tmp_path: Path, tokenized: list[str]) -> None:
    pair = {
        "input": {"messages": [{"role": "user", "content": "open"}]},
        "preferred_output": [{"role": "assistant", "content": "yes"}],
        "non_preferred_output": [{"role": "assistant", "content": "no"}],
    }
    path = write(tmp_path / "pairs.jsonl", [pair, pair])
    fresh, kept = (made(path, model_folder, settings_for(tmp_path / "cache")) for _ in range(2))
    assert fresh == kept == made(path, model_folder, settings_for(None))
    assert (kept["width"], kept["groups"]) == (2, [(0, 1), (2, 3)])
    assert len(tokenized) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda settings, folder: (replace(settings, max_seq_length=63), folder),
        lambda settings, folder: (replace(settings, train_on_inputs=True), folder),
        lambda settings, folder: (replace(settings, template_date="2024-07-27"), folder),
        lambda settings, folder: (settings, replace(folder, template_sha256="0" * 64)),
        lambda settings, folder: (settings, replace(folder, tokenizer_sha256="0" * 64)),
        lambda settings, folder: (settings, replace(folder, eos_id=folder.eos_id + 1)),
    ],
)
def test_whatever_decides_tokens_is_in_the_name(
    train_file: Path,
    model_folder: ModelFolder,
    tmp_path: Path,
    tokenized: list[str],
    change: Callable[[PrepareSettings, ModelFolder], tuple[PrepareSettings, ModelFolder]],
) -> None:
    settings = settings_for(tmp_path / "cache")
    made(train_file, model_folder, settings)
    other_settings, other_folder = change(settings, model_folder)
    made(train_file, other_folder, other_settings)
    assert len(tokenized) == 2


def test_other_code_makes_its_own(
    train_file: Path,
    model_folder: ModelFolder,
    tmp_path: Path,
    tokenized: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_for(tmp_path / "cache")
    made(train_file, model_folder, settings)
    monkeypatch.setattr(shards, "preparation_version", lambda: "other")
    made(train_file, model_folder, settings)
    train_file.write_text(train_file.read_text() + "\n")
    made(train_file, model_folder, settings)
    assert len(tokenized) == 3


def _flip(folder: Path) -> None:
    path = folder / "ids.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _cut(folder: Path) -> None:
    (folder / "offsets.npy").write_bytes((folder / "offsets.npy").read_bytes()[:-8])


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        _cut,
        lambda folder: (folder / "labelled.npy").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text('{"files": []}'),
    ],
)
def test_what_is_damaged_is_never_trusted(
    train_file: Path, model_folder: ModelFolder, tmp_path: Path, tokenized: list[str], damage: Callable[[Path], None]
) -> None:
    cache = tmp_path / "cache"
    good = made(train_file, model_folder, settings_for(cache))
    (folder,) = [path for path in cache.iterdir() if path.name != "locks"]
    damage(folder)
    assert made(train_file, model_folder, settings_for(cache)) == good
    assert made(train_file, model_folder, settings_for(cache)) == good
    assert len(tokenized) == 2, "made anew once, and whole since then"


_KILLED = """
import os, signal, sys
from pathlib import Path
from services.trainer.train.disk import durable
from services.trainer.train.data.preparation import prepare
from services.trainer.train.settings.directories import Directories
from services.trainer.train.data.tokens.prepare_settings import PrepareSettings
from services.trainer.train.data.tokens.base_tokenizer import open_model_folder
prepare.CACHED_FILE_BYTES_MIN = 0
durable._sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
settings = PrepareSettings(
    max_seq_length=64, packing=True, train_on_inputs="auto", template_date="2024-07-26",
    directories=Directories(cache=Path(sys.argv[3]))
)
prepare.prepare_dataset(Path(sys.argv[1]), "train", open_model_folder(Path(sys.argv[2])), settings, pack_rows=True)
"""


def test_a_writer_that_was_killed_leaves_nothing_that_counts(
    train_file: Path, model_directory: Path, tmp_path: Path, tokenized: list[str]
) -> None:
    cache, model_folder = tmp_path / "cache", open_model_folder(model_directory)
    command = [sys.executable, "-c", _KILLED, str(train_file), str(model_directory), str(cache)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path for path in cache.iterdir() if path.name.startswith(UNFINISHED_PREFIX)]
    good = made(train_file, model_folder, settings_for(cache))
    assert not [path for path in cache.iterdir() if path.name.startswith(UNFINISHED_PREFIX)]
    assert (
        made(train_file, model_folder, settings_for(cache))
        == good
        == made(train_file, model_folder, settings_for(None))
    )
    assert len(tokenized) == 2


_AT_ONCE = """
import sys
from pathlib import Path
from services.trainer.train.data.preparation import prepare
from services.trainer.train.data.tokens import tokenized_file
from services.trainer.train.settings.directories import Directories
from services.trainer.train.data.tokens.prepare_settings import PrepareSettings
from services.trainer.train.data.tokens.base_tokenizer import open_model_folder
prepare.CACHED_FILE_BYTES_MIN = 0
made = []
prepare.tokenize_file = lambda *rest: made.append(1) or tokenized_file.tokenize_file(*rest)
settings = PrepareSettings(
    max_seq_length=64, packing=True, train_on_inputs="auto", template_date="2024-07-26",
    directories=Directories(cache=Path(sys.argv[3]))
)
folder = open_model_folder(Path(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
data = prepare.prepare_dataset(Path(sys.argv[1]), "train", folder, settings, pack_rows=True)
print(len(made), data.sequences.digest)
"""


def test_processes_that_come_at_once_make_it_once(train_file: Path, model_directory: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _AT_ONCE, str(train_file), str(model_directory), str(tmp_path / "cache")]
    crowd = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    for process in crowd:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    told = [process.communicate("go\n", timeout=60)[0].split() for process in crowd]
    assert sorted(made for made, _ in told) == ["0", "0", "1"]
    assert len({digest for _, digest in told}) == 1


def test_the_least_used_go_above_the_limit_and_readers_keep_what_they_hold(
    train_file: Path, model_folder: ModelFolder, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    small = replace(settings_for(cache), directories=Directories(cache=cache, cache_bytes_max=1))
    held = prepare_dataset(train_file, "train", model_folder, small, pack_rows=True)
    held = prepare_dataset(train_file, "train", model_folder, small, pack_rows=True)
    assert isinstance(held, Dataset)
    before = held.rows.ids.tolist()
    made(train_file, model_folder, replace(small, max_seq_length=32))
    assert len([path for path in cache.iterdir() if path.name != "locks"]) == 1
    assert held.rows.ids.tolist() == before


def test_without_a_place_to_keep_it_the_file_is_still_prepared(
    train_file: Path, model_folder: ModelFolder, tmp_path: Path
) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("no folder")
    assert made(train_file, model_folder, settings_for(occupied)) == made(train_file, model_folder, settings_for(None))


def test_a_full_disk_is_ours_and_not_a_file_that_cannot_be_read(
    train_file: Path, model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scratch files that find no room end the work; a cache that finds none is done without."""
    good = made(train_file, model_folder, settings_for(None))

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write", full)
        assert made(train_file, model_folder, settings_for(tmp_path / "cache")) == good
        assert [path.name for path in (tmp_path / "cache").iterdir()] == ["locks"]
    monkeypatch.setattr(spill, "MEMORY_BYTES_MAX", 0)
    assert made(train_file, model_folder, settings_for(None)) == good
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(Failure, match="the disk is full") as failed:
        made(train_file, model_folder, settings_for(None))
    assert (failed.value.kind, failed.value.details) == ("platform", {"cause": "disk_full"})


def test_a_refused_file_is_refused_each_time(model_folder: ModelFolder, tmp_path: Path, tokenized: list[str]) -> None:
    path = write(tmp_path / "broken.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": 1, "completion": "b"}])
    told = [
        prepare_dataset(path, "train", model_folder, settings_for(tmp_path / "cache"), pack_rows=True) for _ in "12"
    ]
    assert told[0] == told[1]
    assert not isinstance(told[0], Dataset)
    assert tokenized == ["train", "train"]
