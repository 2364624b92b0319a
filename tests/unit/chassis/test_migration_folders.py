"""The migrations of the tree can be read as they are: two changes that took the same number are found at once."""

from pathlib import Path

import pytest

from chassis.db.migrations import CHASSIS_MIGRATIONS, read_folder

ROOT = Path(__file__).parents[3]
FOLDERS = [CHASSIS_MIGRATIONS, *sorted((ROOT / "services").glob("*/migrations"))]


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.parent.name for folder in FOLDERS])
def test_every_file_has_a_number_of_its_own_without_gaps(folder: Path) -> None:
    numbers = [int(Path(file.filename).name[:4]) for file in read_folder(folder)]
    assert numbers == list(range(1, len(numbers) + 1))
