"""A recipe's model is made once, however many start from an empty cache at the same time."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.trainer.train.recipes import main as recipes
from services.trainer.train.recipes.model_shapes import RECIPES

MEET_S = 0.5


def test_two_that_find_no_model_make_it_once_and_both_have_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting = threading.Barrier(2)

    def write(_: object, folder: Path) -> None:
        (folder / "first").touch()
        # Nobody comes: the other one waits for its turn.
        with pytest.raises(threading.BrokenBarrierError):
            meeting.wait(MEET_S)
        (folder / "second").touch()

    monkeypatch.setattr(recipes, "_write", write)

    def make(name: str) -> bool:
        return recipes.make(RECIPES["tiny-llama"], tmp_path / name, tmp_path / "cache")

    with ThreadPoolExecutor(2) as pool:
        cached = list(pool.map(make, ("one", "two")))
    assert sorted(cached) == [False, True]
    for name in ("one", "two"):
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["first", "second"]
