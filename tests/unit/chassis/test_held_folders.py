"""A folder is left alone while a process works in it, and goes when the process was killed."""

import subprocess
import sys
from pathlib import Path

from chassis.objects.held_folders import HeldFolders

WORKER = """
import sys
from pathlib import Path
from chassis.objects.held_folders import HeldFolders
held = HeldFolders(Path(sys.argv[1])).open("theirs")
(held.path / "file").write_bytes(b"x")
print("ready", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_left_goes_and_what_is_worked_on_stays(tmp_path: Path) -> None:
    folders = HeldFolders(tmp_path)
    own = folders.open("own")
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == b"ready\n"
    assert folders.sweep() == []
    worker.kill()
    worker.communicate()
    assert folders.sweep() == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
    own.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_renamed_belongs_to_its_new_name(tmp_path: Path) -> None:
    folders = HeldFolders(tmp_path, prefix=".")
    held = folders.open("part")
    (held.path / "file").write_bytes(b"x")
    held.path.rename(tmp_path / "whole")
    held.close()
    assert folders.sweep() == []
    assert (tmp_path / "whole/file").exists()


def test_a_root_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert HeldFolders(tmp_path / "none").sweep() == []
