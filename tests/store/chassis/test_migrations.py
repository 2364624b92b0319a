"""Migrations on a real database: once each, in order, by many processes at once, and never against a changed file."""

import multiprocessing
from pathlib import Path

import pytest

from chassis.db.migrations import CHASSIS_MIGRATIONS, MigrationError, migrate
from chassis.db.pool import open_pool
from chassis.settings import ChassisSettings
from tests.harness.fixtures import SettingsFactory
from tests.harness.servers import PostgresServer


def _folder(root: Path) -> Path:
    folder = root / "things" / "migrations"
    folder.mkdir(parents=True)
    (folder / "0001_things.sql").write_text(
        "CREATE TABLE things (id bigint PRIMARY KEY);"
        "CREATE TABLE limits AS SELECT current_setting('transaction_timeout') AS transaction_limit;"
    )
    # Would fail if two processes applied it.
    (folder / "0002_more.sql").write_text("ALTER TABLE things ADD COLUMN name text; SELECT pg_sleep(0.2);")
    return folder


async def test_twice_is_once(postgres: PostgresServer, make_settings: SettingsFactory, tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    async with postgres.scratch() as url:
        pool = await open_pool(make_settings(database_url=url))
        first = await migrate(pool, [folder])
        assert first[-2:] == ["things/0001_things.sql", "things/0002_more.sql"]
        assert len(first) == 2 + len(list(CHASSIS_MIGRATIONS.glob("*.sql")))
        assert await migrate(pool, [folder]) == []
        assert await pool.fetchval("SELECT count(*) FROM schema_migrations") == len(first)
        # A large table may take longer than any other transaction.
        assert await pool.fetchval("SELECT transaction_limit FROM limits") == "0"
        assert await pool.fetchval("SHOW transaction_timeout") == "1min"
        await pool.close()


async def test_changed_missing_and_late_files_are_refused(
    postgres: PostgresServer, make_settings: SettingsFactory, tmp_path: Path
) -> None:
    folder = _folder(tmp_path)
    async with postgres.scratch() as url:
        pool = await open_pool(make_settings(database_url=url))
        await migrate(pool, [folder])
        file = folder / "0001_things.sql"
        text = file.read_text()
        file.write_text(text + "\n-- a harmless word")
        with pytest.raises(MigrationError, match=r"0001_things\.sql changed"):
            await migrate(pool, [folder])
        file.unlink()
        with pytest.raises(MigrationError, match=r"0001_things\.sql was applied"):
            await migrate(pool, [folder])
        file.write_text(text)
        assert await migrate(pool, [folder]) == []
        await pool.close()


async def test_failed_file_leaves_nothing(
    postgres: PostgresServer, make_settings: SettingsFactory, tmp_path: Path
) -> None:
    folder = _folder(tmp_path)
    (folder / "0003_broken.sql").write_text("CREATE TABLE half (id bigint); SELECT nonsense FROM nowhere;")
    async with postgres.scratch() as url:
        pool = await open_pool(make_settings(database_url=url))
        with pytest.raises(Exception, match="nowhere"):
            await migrate(pool, [folder])
        assert await pool.fetchval("SELECT to_regclass('half')") is None
        (folder / "0003_broken.sql").write_text("CREATE TABLE whole (id bigint);")
        assert await migrate(pool, [folder]) == ["things/0003_broken.sql"]
        await pool.close()


async def test_two_processes_at_once(postgres: PostgresServer, make_settings: SettingsFactory, tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    async with postgres.scratch() as url:
        settings = make_settings(database_url=url)
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=_migrate_in_process, args=(settings, folder)) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=60)
        assert [process.exitcode for process in processes] == [0, 0, 0]
        pool = await open_pool(settings)
        assert await migrate(pool, [folder]) == []
        await pool.close()


def _migrate_in_process(settings: ChassisSettings, folder: Path) -> None:
    import asyncio

    async def body() -> None:
        pool = await open_pool(settings)
        await migrate(pool, [folder])
        await pool.close()

    asyncio.run(body())
