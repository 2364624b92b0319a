"""Files of imports that died are removed from a real store, and none that a model or a living import needs."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from chassis.clock import SystemClock
from chassis.db.pool import Pool, transaction
from chassis.errors import Unavailable
from chassis.ids import SeededIds
from chassis.objects.held_folders import HeldFolders
from chassis.objects.object_store import PART_BYTES_MIN, ObjectStore
from formats.manifests import FileDigest
from services.inference.config import InferenceSettings
from services.inference.models import base_import
from services.inference.models.base_import import BaseImporter, ImportHeader, ImportPart
from services.inference.models.base_uploads import BaseUploads
from services.inference.models.model_facts import ModelFacts

KEY = "base/demo/llama/rv_1/"
DEAD = "UPDATE base_uploads SET begin_time = begin_time - interval '7 hours' WHERE upload_id = $1"
SETTINGS = InferenceSettings(engine="stub")


async def content() -> AsyncIterator[bytes]:
    yield b"x"


class Store(ObjectStore):
    def __init__(self, root: Path) -> None:
        super().__init__(f"file://{root}", part_bytes=PART_BYTES_MIN, parts_in_flight_max=1)
        self.root = root

    @property
    def names(self) -> list[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())


@pytest.fixture
async def uploads(pool: Pool, tmp_path: Path) -> BaseUploads:
    await pool.execute("TRUNCATE base_uploads, base_models, models")
    return BaseUploads(pool, Store(tmp_path), settings=SETTINGS, ids=SeededIds(3))


@pytest.fixture
async def store(uploads: BaseUploads, tmp_path: Path) -> Store:
    """With one file of a model, and half of another."""
    store = Store(tmp_path)
    await store.put(KEY + "config.json", content())
    (tmp_path / KEY / "model.safetensors#1").write_bytes(b"x")
    await store.put("base/demo/llama/rv_10/config.json", content())
    return store


OTHER = ["base/demo/llama/rv_10/config.json"]
OWN = ["base/demo/llama/rv_1/config.json", "base/demo/llama/rv_1/model.safetensors#1"]


async def list_model(pool: Pool, key: str = KEY) -> None:
    await pool.execute(
        "INSERT INTO base_models (model_id, revision, artifact_key, files, architecture, parameter_count,"
        " context_tokens_max, size_bytes, current, created_at) VALUES ('demo/llama', 'rv_1', $1, '[]', 'a', 1, 1, 1,"
        " true, now())",
        key,
    )


async def test_what_a_killed_import_left_is_removed(pool: Pool, uploads: BaseUploads, store: Store) -> None:
    upload = await uploads.begin(KEY)
    await uploads.collect_dead()
    assert store.names == OWN + OTHER
    await pool.execute(DEAD, upload)
    await uploads.collect_dead()
    assert store.names == OTHER
    assert await pool.fetchval("SELECT count(*) FROM base_uploads") == 0


async def test_a_failed_import_is_removed_at_once(uploads: BaseUploads, store: Store) -> None:
    await uploads.collect(await uploads.begin(KEY))
    assert store.names == OTHER


async def test_a_listed_model_keeps_its_files_though_importing_it_again_failed(
    pool: Pool, uploads: BaseUploads, store: Store
) -> None:
    await list_model(pool)
    await uploads.collect(await uploads.begin(KEY))
    assert store.names == OWN + OTHER
    assert await pool.fetchval("SELECT count(*) FROM base_uploads") == 0


async def test_a_listed_adapter_keeps_its_files_until_it_is_deleted(
    pool: Pool, uploads: BaseUploads, store: Store
) -> None:
    await pool.execute(
        "INSERT INTO models (id, project_id, model_id, kind, base_model, base_revision, revision, artifact_key, files,"
        " adapter_rank, tuning_job, lineage, created_at) VALUES ('ml_1', 'p', 'p/a', 'adapter', 'b', 'r', 'r', $1,"
        " '[]', 1, 'import:ml_1', '{}', now())",
        KEY,
    )
    await uploads.collect(await uploads.begin(KEY))
    assert store.names == OWN + OTHER
    await pool.execute("UPDATE models SET deleted_at = now()")
    await uploads.collect(await uploads.begin(KEY))
    assert store.names == OTHER


async def test_another_import_under_way_keeps_what_is_there(pool: Pool, uploads: BaseUploads, store: Store) -> None:
    dead, living = await uploads.begin(KEY), await uploads.begin(KEY)
    await pool.execute(DEAD, dead)
    await uploads.collect_dead()
    assert store.names == OWN + OTHER
    async with transaction(pool) as connection:
        assert await uploads.finish(connection, living, KEY)


async def test_an_import_whose_files_are_being_removed_is_no_model(pool: Pool, uploads: BaseUploads) -> None:
    """As after a step of the database's clock: it fails, can be sent again, and is never listed without its files."""
    slow, other = await uploads.begin(KEY), await uploads.begin(KEY)
    await pool.execute("UPDATE base_uploads SET claim_time = now() WHERE upload_id = $1", slow)
    async with transaction(pool) as connection:
        assert not await uploads.finish(connection, slow, KEY)
        assert not await uploads.finish(connection, other, KEY)
    with pytest.raises(Unavailable):
        await uploads.begin(KEY)
    await pool.execute("UPDATE base_uploads SET claim_time = now() - interval '1 hour', begin_time = '2000-01-01'")
    await uploads.collect_dead()
    await uploads.collect_dead()
    await uploads.begin(KEY)


async def test_an_import_that_fails_half_way_leaves_nothing(
    pool: Pool, uploads: BaseUploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not its spool folder."""

    class Failing(Store):
        async def put(self, key: str, chunks: AsyncIterator[bytes], *, synced: bool = False) -> None:
            if key.endswith("b.json"):
                raise Unavailable("DEPENDENCY_UNAVAILABLE", "the store is away")
            await super().put(key, chunks, synced=synced)

    async def parts() -> AsyncIterator[ImportPart]:
        yield ImportHeader(model_id="demo/llama", source="")
        for name in ("a.json", "b.json"):
            yield FileDigest(path=name, size_bytes=1, sha256=hashlib.sha256(b"x").hexdigest())
            yield b"x"

    facts = ModelFacts(architecture="a", parameter_count=1, context_tokens_max=1)
    monkeypatch.setattr(base_import, "read_facts", lambda folder, files: facts)
    # These files are no model; whether a model can serve is another test's matter.
    monkeypatch.setattr(base_import, "check_files", _found_good)
    store, spools = Failing(tmp_path / "store"), HeldFolders(tmp_path / "imports")
    own = BaseUploads(pool, store, settings=SETTINGS, ids=SeededIds(4))
    importer = BaseImporter(pool, store, own, spools, settings=SETTINGS, clock=SystemClock(), ids=SeededIds(5))
    with pytest.raises(Unavailable):
        await importer.run(parts())
    assert store.names == []
    assert list((tmp_path / "imports").iterdir()) == []
    assert await pool.fetchval("SELECT count(*) FROM base_uploads") == 0


async def _found_good(folder: Path, settings: InferenceSettings) -> None:
    """In place of the check of an import's files."""
