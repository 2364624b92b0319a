"""The journal in beancount's format, judged by the real bean-check: exact to the nano-dollar."""

import subprocess
import sys
from pathlib import Path

from finemesh.billing.v1.ledger_service_pb2 import JournalEntry
from finemesh_client.accounting.beancount import amount, render
from tests.unit.client.test_journal import changed, journal, moved, sample

BEAN_CHECK = Path(sys.executable).with_name("bean-check")


def checked(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "journal.beancount"
    file.write_text(text, encoding="utf-8")
    return subprocess.run(
        [BEAN_CHECK, "--no-cache", str(file)], capture_output=True, text=True, timeout=60, check=False
    )


def rendered(entries: list[JournalEntry]) -> str:
    return "".join(render("acme", entries))


def test_a_journal_is_found_balanced(tmp_path: Path) -> None:
    text = rendered(sample())
    done = checked(tmp_path, text)
    assert (done.returncode, done.stderr) == (0, "")
    assert '2026-11-23 * "top_up" "organizations/acme"' in text
    assert "  Assets:Finemesh:Prepaid  5.000000001 USD" in text
    assert "2026-11-24 balance Assets:Finemesh:Prepaid  4.000000001 ~ 0 USD" in text


def test_one_nano_dollar_is_found(tmp_path: Path) -> None:
    done = checked(tmp_path, rendered(moved(1, 0, 1)))
    assert done.returncode == 1
    assert "does not balance" in done.stderr
    assert "0.000000001 USD" in done.stderr


def test_a_balance_that_is_off_by_one_nano_dollar_is_found(tmp_path: Path) -> None:
    text = rendered(sample())
    lie = text.replace("balance Assets:Finemesh:Prepaid  4.000000001", "balance Assets:Finemesh:Prepaid  4.000000002")
    assert lie != text
    done = checked(tmp_path, lie)
    assert done.returncode == 1
    assert "Balance failed" in done.stderr


def test_odd_names_stay_text(tmp_path: Path) -> None:
    entries = changed(sample(), 0, resource='a "quoted" \\ name\nwith a break')
    done = checked(tmp_path, rendered(entries))
    assert (done.returncode, done.stderr) == (0, "")


def test_an_empty_journal_is_a_file_too(tmp_path: Path) -> None:
    assert checked(tmp_path, rendered(journal([]))).returncode == 0


def test_amounts_are_exact() -> None:
    assert [amount(n) for n in (0, 1, -1, 10**18 + 1, -1_500_000_000)] == [
        "0.000000000",
        "0.000000001",
        "-0.000000001",
        "1000000000.000000001",
        "-1.500000000",
    ]
