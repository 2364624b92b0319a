"""Price books on the command line: what is wrong is told with its line before a service meets it."""

import subprocess
import sys
from pathlib import Path

import pytest

from services.billing.prices.catalogue import read_folder
from services.billing.prices.check import EXIT_USAGE, EXIT_WRONG, main
from services.billing.prices.pricebook import BookConflict
from services.billing.prices.yaml import BookInvalid
from tests.unit.billing.wrong_books import GOOD, GOOD_IN_FULL

ROOT = Path(__file__).parents[3]


def test_the_books_of_billing_are_right_and_shown() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.billing.prices.check"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert "Validation tokens: validation_tokens x epochs x evaluations x rate" in done.stdout
    assert "minimum 5.00 USD for completed" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["nvidia-l40s-48gb", "1.49", "0.024833333"] in lines
    assert ["nvidia-h100-80gb", "26.88"] in lines


def test_every_part_of_a_book_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full.yaml").write_text(GOOD_IN_FULL)
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "in force from 2026-01-01 until 2027-01-01" in shown
    assert "base fee 0.25 USD for completed, user_failure" in shown
    assert [line.split() for line in shown.splitlines() if line.split()[:1] == ["2"]] == [
        ["2", "to", "16", "billion", "parameters", "4.00", "-", "-", "-", "-", "-"],
        ["2", "to", "16", "billion", "parameters", "0.10", "0.20"],
    ]


def test_each_wrong_book_is_told_with_its_line_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    negative, right, later = (tmp_path / name for name in ("a.yaml", "b.yaml", "c.yaml"))
    negative.write_text(GOOD.replace("minimum_usd: 5.00", "minimum_usd: -5.00"))
    right.write_text(GOOD)
    later.write_text(GOOD.replace("test-1", "test-2").replace("2026-01-01", "2026-06-01"))
    assert main([str(tmp_path), str(tmp_path / "missing.yaml")]) == EXIT_WRONG
    told = capsys.readouterr()
    errors = told.err.splitlines()
    assert len(errors) == 3
    assert errors[0].startswith(f"error: {negative}, line 9: ")
    assert errors[1].startswith(
        f"error: {later}, line 3: price books 'test-1' and 'test-2' are effective at the same time"
    )
    assert f"(the other: {right}, line 3)" in errors[1]
    assert "missing.yaml" in errors[2]
    assert told.out.startswith("test-1 ")


def test_a_folder_without_books_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == EXIT_USAGE
    assert "no price book in" in capsys.readouterr().err


def test_a_file_that_is_no_utf_8_is_told_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "a.yaml"
    wrong.write_bytes(GOOD.replace("Training,", "Entraînement,").encode("latin-1"))
    assert main([str(wrong)]) == EXIT_WRONG
    assert capsys.readouterr().err.startswith(f"error: {wrong}, line 7: not UTF-8")
    with pytest.raises(BookInvalid, match=r"^a\.yaml, line 7: not UTF-8"):
        read_folder(tmp_path)


def test_a_book_with_the_short_ending_is_read_like_the_others(tmp_path: Path) -> None:
    """Passed over, it would leave the old prices in force without a word."""
    (tmp_path / "a.yaml").write_text(GOOD)
    (tmp_path / "b.yml").write_text(GOOD_IN_FULL.replace("book: test", "book: other"))
    assert list(read_folder(tmp_path)) == ["test-1", "test-2"]
    (tmp_path / "b.yml").write_text(GOOD)
    with pytest.raises(BookConflict, match=r"^b\.yml, line 2: .* exists twice"):
        read_folder(tmp_path)
    assert main([str(tmp_path)]) == EXIT_WRONG
