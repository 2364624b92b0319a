"""The micro-batches of a whole file: the rows of each process, all of them once, in no more than a number a row and one
micro-batch.

The measurement runs in processes of its own, since a process gives little back of what it once took.
"""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from services.trainer.train.data.batches.file_batches import FileBatches
from services.trainer.train.data.batches.micro_batch import Layout, group_ends, micro_batches
from services.trainer.train.data.tokens.token_rows import TokenRows
from services.trainer.train.runtime.process_group import Group

ROOT = Path(__file__).parents[3]
LENGTHS = [1 + (number * number * 7) % 61 for number in range(200)]


def rows_of(lengths: list[int], rows_per_example: int = 1) -> TokenRows:
    total = sum(lengths)
    return TokenRows(
        ids=np.arange(total, dtype=np.int32) % 999,
        labelled=np.ones(total, np.bool_),
        offsets=np.cumsum(np.array([0, *lengths], np.int64)),
        rows_per_example=rows_per_example,
        rows=len(lengths) // rows_per_example,
        truncated_rows=0,
        skipped_rows=0,
        longest_row_tokens=max(lengths),
    )


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
def test_every_row_is_in_one_micro_batch_of_one_process_within_the_budget(
    layout: Layout, width: int, size: int
) -> None:
    rows = rows_of(LENGTHS, width)
    parts = [
        FileBatches(rows, tokens_max=128, layout=layout, device="cpu", group=Group(rank=rank, size=size))
        for rank in range(size)
    ]
    laid = [list(part) for part in parts]
    assert len({len(batches) for batches in laid}) == 1
    assert [len(part) for part in parts] == [len(batches) for batches in laid]
    found = Counter(row for batches in laid for batch in batches if batch.labelled for row in batch.rows)
    # The first token of a row is never predicted: a row of one token has nothing to learn.
    assert {row for row, length in enumerate(LENGTHS) if length > 1} <= set(found)
    assert set(found.values()) == {1}
    for batches in laid:
        assert all(batch.input_ids.numel() <= 128 or len(batch.rows) == width for batch in batches)


def test_alone_it_lays_out_what_a_step_of_all_rows_would() -> None:
    rows = rows_of(LENGTHS)
    lazily = [batch.rows for batch in FileBatches(rows, tokens_max=200, layout="padded", device="cpu")]
    at_once = micro_batches(rows, range(len(LENGTHS)), tokens_max=200, layout="padded", device="cpu")
    assert lazily == [batch.rows for batch in at_once]


def test_a_row_beyond_the_budget_is_alone_and_no_budget_is_left_unused() -> None:
    lengths = np.array([300, 90, 60, 50, 40, 40, 20], np.int64)
    assert group_ends(lengths, tokens_max=200, layout="padded") == [0, 1, 3, 7]
    assert group_ends(lengths, tokens_max=200, layout="packed") == [0, 1, 4, 7]


def test_it_says_whether_a_smaller_budget_would_help() -> None:
    rows = rows_of([50, 40, 30])
    assert FileBatches(rows, tokens_max=100, layout="padded", device="cpu").is_divisible
    assert not FileBatches(rows, tokens_max=60, layout="packed", device="cpu").is_divisible


_LOOK = """
import sys
from pathlib import Path
import numpy as np
from services.trainer.train.data.tokens.token_rows import TokenRows
from services.trainer.train.data.batches.file_batches import FileBatches

def anonymous_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

count, length, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
rows = TokenRows(
    ids=np.load(folder / "ids.npy", mmap_mode="r"), labelled=np.load(folder / "labelled.npy", mmap_mode="r"),
    offsets=np.arange(0, count * length + 1, length), rows=count, truncated_rows=0, skipped_rows=0,
    longest_row_tokens=length,
)
before = anonymous_bytes()
batches, peak, tokens = FileBatches(rows, tokens_max=8192, layout="padded", device="cpu"), before, 0
for batch in batches if sys.argv[4] == "in turn" else list(batches):
    tokens += batch.input_ids.numel()
    peak = max(peak, anonymous_bytes())
print(peak - before, tokens)
"""


def growth_of(how: str, count: int, length: int, folder: Path) -> tuple[int, int]:
    """Bytes and tokens of a look at the whole file."""
    command = [sys.executable, "-c", _LOOK, str(count), str(length), str(folder), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    grown, tokens = map(int, done.stdout.split())
    return grown, tokens


def test_a_look_at_a_large_file_takes_the_memory_of_one_micro_batch(tmp_path: Path) -> None:
    """Tokens lie in mapped files, as those of a large file do; ids and targets of all at once would be 16 bytes a
    token."""
    count, length = 32768, 128
    np.save(tmp_path / "ids.npy", np.arange(count * length, dtype=np.int32) % 500)
    np.save(tmp_path / "labelled.npy", np.ones(count * length, np.bool_))
    (in_turn, tokens), (at_once, same) = (growth_of(how, count, length, tmp_path) for how in ("in turn", "at once"))
    print(f"in turn {in_turn >> 20} MiB, at once {at_once >> 20} MiB, {tokens} tokens")
    assert tokens == same == count * length
    assert in_turn < 8 * 1024**2 < 14 * tokens < at_once
