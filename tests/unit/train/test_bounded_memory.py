"""A file of four times the rows is read, tokenised, packed and cached in the memory of the smaller one.

What is counted is memory that the kernel cannot take back at will: the tokens of a large file lie in mapped files. Each
run is a process of its own, since a process gives little back of what it once took.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.trainer.train.disk.spill import MEMORY_BYTES_MAX

ROOT = Path(__file__).parents[3]
# An array may hold this much before it goes to the disk, and allocators hold on to some of what they were given back.
ALLOCATOR_BYTES = 16 * 1024**2

_PREPARE = """
import sys, threading
from pathlib import Path
from services.trainer.train.data.preparation import prepare
from services.trainer.train.disk import spill
from services.trainer.train.settings.directories import Directories
from services.trainer.train.data.tokens.prepare_settings import PrepareSettings
from services.trainer.train.data.tokens.base_tokenizer import open_model_folder
spill.MEMORY_BYTES_MAX = int(sys.argv[3])

def anonymous_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous_bytes())

folder = open_model_folder(Path(sys.argv[2]))
work = Path(sys.argv[4])
settings = PrepareSettings(
    max_seq_length=512, packing=True, train_on_inputs="auto", template_date="2024-07-26",
    directories=Directories(scratch=work, cache=work / "cache"),
)
threading.Thread(target=watch, daemon=True).start()
data = prepare.prepare_dataset(Path(sys.argv[1]), "train", folder, settings, pack_rows=True)
done.set()
print(peak, data.rows.count, data.rows.token_count)
"""


def peak_of(path: Path, model: Path, spilled_at: int, work: Path) -> tuple[int, int, int]:
    """Bytes, rows and tokens."""
    work.mkdir()
    command = [sys.executable, "-c", _PREPARE, str(path), str(model), str(spilled_at), str(work)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    peak, rows, tokens = map(int, done.stdout.split())
    return peak, rows, tokens


def write_lines(path: Path, count: int) -> None:
    line = json.dumps({"prompt": "what is it?", "completion": "the of and to in a is " * 60}) + "\n"
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            stream.write(line)


def write_tokens(path: Path, count: int) -> None:
    """Rows of 256 tokens."""
    schema = pa.schema([("input_ids", pa.list_(pa.int32()))])
    values = pa.array(np.arange(256 * 4096, dtype=np.int32) % 500)
    block = pa.ListArray.from_arrays(pa.array(np.arange(0, 256 * 4096 + 1, 256, dtype=np.int32)), values)
    with pq.ParquetWriter(path, schema) as writer:
        for _ in range(count // 4096):
            writer.write_table(pa.table([block], schema=schema))


@pytest.mark.parametrize(
    ("write", "rows", "spilled_at", "bytes_a_token"),
    [(write_tokens, 40960, MEMORY_BYTES_MAX, 5), (write_lines, 4000, 1024**2, 5)],
    ids=["tokens", "lines"],
)
def test_memory_does_not_grow_with_the_file(
    write: Callable[[Path, int], None],
    rows: int,
    spilled_at: int,
    bytes_a_token: int,
    model_directory: Path,
    tmp_path: Path,
) -> None:
    measured = []
    for times in (1, 4):
        path = tmp_path / f"rows-{times}"
        write(path, times * rows)
        measured.append(peak_of(path, model_directory, spilled_at, tmp_path / f"work-{times}"))
        path.unlink()
    (small_peak, small_rows, small_tokens), (large_peak, large_rows, large_tokens) = measured
    assert (large_rows, large_tokens) == (4 * small_rows, 4 * small_tokens)
    growth, held = large_peak - small_peak, bytes_a_token * (large_tokens - small_tokens)
    # Lengths, order and plan are held: they are numbers per row, not per token.
    per_row = 8 * 12 * (large_rows - small_rows)
    bound = 2 * spilled_at + per_row + ALLOCATOR_BYTES
    print(f"peaks {small_peak >> 20} and {large_peak >> 20} MiB, bound {bound >> 20} MiB, tokens {held >> 20} MiB")
    assert growth < bound < held
