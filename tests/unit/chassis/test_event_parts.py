"""The pure parts of the event path and of the database access."""

import random
import uuid
from pathlib import Path

import pytest
from google.protobuf import empty_pb2

from chassis.backoff import Backoff
from chassis.bus.outbox import event_id_of
from chassis.bus.subjects import stream_of, subject_of
from chassis.db.migrations import MigrationError, MigrationFile, missing, read_folder
from chassis.db.queries import affected, statements


def test_backoff_grows_to_its_limit_and_starts_over() -> None:
    backoff = Backoff(first_s=1, last_s=5, source=random.Random(1))
    waits = [backoff.next_s() for _ in range(5)]
    for wait, step in zip(waits, (1, 2, 4, 5, 5), strict=True):
        assert step / 2 <= wait <= step
    backoff.reset()
    assert backoff.next_s() <= 1


def test_stream_is_the_first_token() -> None:
    assert stream_of("tuning.job.state_changed") == "TUNING"
    for bad in ("tuning", "", ".job", "tuning.", "a-b.c"):
        with pytest.raises(ValueError, match="is not"):
            stream_of(bad)


def test_message_without_a_subject_is_no_event() -> None:
    with pytest.raises(ValueError, match=r"google\.protobuf\.Empty"):
        subject_of(empty_pb2.Empty)


def test_event_id_follows_from_source_type_and_key() -> None:
    first = event_id_of("scheduler", "a.B", "job/1-20")
    assert first == event_id_of("scheduler", "a.B", "job/1-20")
    others = {
        event_id_of("billing", "a.B", "job/1-20"),
        event_id_of("scheduler", "a.C", "job/1-20"),
        event_id_of("scheduler", "a.B", "job/1-21"),
    }
    assert first not in others
    assert len(others) == 3
    assert isinstance(first, uuid.UUID)


@pytest.mark.parametrize(("status", "rows"), [("UPDATE 3", 3), ("INSERT 0 1", 1), ("DELETE 0", 0)])
def test_affected(status: str, rows: int) -> None:
    assert affected(status) == rows


def test_statements_are_positional(tmp_path: Path) -> None:
    file = tmp_path / "queries.sql"
    file.write_text(
        "-- name: get_thing(project, thing)^\n-- One thing.\n"
        "SELECT id FROM things WHERE project = :project AND id = :thing AND owner = :project;\n\n"
        "-- name: list_things(ids)\n-- Many things.\nSELECT id FROM things WHERE id = ANY(:ids::text[]);\n"
    )
    assert statements(file) == {
        "get_thing": "SELECT id FROM things WHERE project = $1 AND id = $2 AND owner = $1;",
        "list_things": "SELECT id FROM things WHERE id = ANY($1::text[]);",
    }


A1, A2 = (MigrationFile(filename=f"a/000{number}_x.sql", sql=f"SELECT {number}") for number in (1, 2))
B1 = MigrationFile(filename="b/0001_x.sql", sql="SELECT 'b'")


def test_missing_migrations_keep_their_order() -> None:
    assert missing([A1, A2, B1], {}) == [A1, A2, B1]
    assert missing([A1, A2, B1], {A1.filename: A1.sha256}) == [A2, B1]
    assert missing([A1, A2], {A1.filename: A1.sha256, A2.filename: A2.sha256}) == []


def test_migrations_of_another_scope_are_not_our_concern() -> None:
    assert missing([A1], {"gone/0001_x.sql": "0" * 64}) == [A1]


def test_disagreement_is_refused() -> None:
    with pytest.raises(MigrationError, match="changed"):
        missing([A1], {A1.filename: "0" * 64})
    with pytest.raises(MigrationError, match="is gone"):
        missing([A2], {A1.filename: A1.sha256})
    with pytest.raises(MigrationError, match="older than"):
        missing([A1, A2], {A2.filename: A2.sha256})


def test_folder_is_read_in_order_under_its_scope(tmp_path: Path) -> None:
    folder = tmp_path / "billing" / "migrations"
    folder.mkdir(parents=True)
    with pytest.raises(MigrationError, match="no migrations"):
        read_folder(folder)
    (folder / "0002_b.sql").write_text("SELECT 2")
    (folder / "0001_a.sql").write_text("SELECT 1")
    assert [file.filename for file in read_folder(folder)] == ["billing/0001_a.sql", "billing/0002_b.sql"]
    (folder / "0002_c.sql").write_text("SELECT 3")
    with pytest.raises(MigrationError, match="two files"):
        read_folder(folder)
    (folder / "0002_c.sql").rename(folder / "later.sql")
    with pytest.raises(MigrationError, match="NNNN_name"):
        read_folder(folder)
