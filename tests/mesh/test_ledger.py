"""The ledger's commands on real processes, through the gateway: verify, export, recompute alone,
run dead letters again."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import nats
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from chassis.bus.subjects import subject_of
from deploy.local.stack import Stack, StackOptions
from deploy.local.table import SERVICES
from finemesh.events.v1 import usage_events_pb2
from finemesh_client import Client, find_config
from tests.harness.polling import eventually

USD = 10**9
WAIT_S_MAX = 60
BEAN_CHECK = str(Path(sys.executable).with_name("bean-check"))
QUICK = {"FINEMESH_CONSUMER_FAILURES_MAX": "2", "FINEMESH_CONSUMER_BACKOFF_S_MIN": "0.05"}


@dataclass(frozen=True, kw_only=True)
class Office:
    """Gateway and billing alone, and somebody who may do everything."""

    stack: Stack
    client: Client
    organization: str
    project: str

    async def run(self, *arguments: str, code: int = 0, **environment: str) -> str:
        """What `finemesh billing ...` prints; it must exit with `code`."""
        command = ("-c", "from finemesh_client.cli.main import app; app()", "billing", *arguments)
        told = {"FINEMESH_ADDRESS": self.client.config.address, "FINEMESH_API_KEY": self.client.config.api_key}
        return await _run(sys.executable, *command, code=code, **{**told, **environment})

    async def rows(self, statement: str) -> list[asyncpg.Record]:
        url = self.stack.environment("billing")["FINEMESH_BILLING_DATABASE_URL"]
        connection = await asyncpg.connect(url)
        try:
            return list(await connection.fetch(statement))
        finally:
            await connection.close()

    async def publish(self, message: Message) -> None:
        bus = await nats.connect(self.stack.bus_url)
        headers = {
            "ce-id": str(uuid.uuid4()),
            "ce-type": message.DESCRIPTOR.full_name,
            "ce-time": datetime.now(UTC).isoformat(),
        }
        await bus.jetstream().publish(subject_of(message), message.SerializeToString(), headers=headers)
        await bus.close()

    async def until(self, statement: str, expected: int) -> None:
        await eventually(lambda: self.rows(statement), lambda rows: rows[0][0] == expected, within_s=WAIT_S_MAX)


async def _run(*command: str, code: int = 0, **environment: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, "COLUMNS": "250", **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode == code, said.decode()
    return said.decode()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def office(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Office]:
    data = tmp_path_factory.mktemp("ledger")
    wanted = tuple(service for service in SERVICES if service.name in ("gateway", "billing"))
    async with (
        Stack(StackOptions(data=data, services=wanted, environment=QUICK)) as stack,
        Client(find_config(data_dir=data)) as client,
    ):
        await client.billing.top_up(20 * USD, request_id="tests")
        caller = await client.identity.caller()
        yield Office(
            stack=stack,
            client=client,
            organization=caller.organization.name.removeprefix("organizations/"),
            project=caller.project.name.removeprefix("projects/"),
        )


def served(office: Office, key: str, tokens: int) -> Message:
    moment = Timestamp()
    moment.FromDatetime(datetime.now(UTC))
    record = usage_events_pb2.InferenceUsage(
        work_key=key,
        project_id=office.project,
        organization_id=office.organization,
        model_id="acme/bot",
        base_model="finemesh/demo-llama",
        input_tokens=tokens,
        usage_time=moment,
    )
    return usage_events_pb2.InferenceUsageRecorded(records=[record])


async def test_a_customer_verifies_exports_and_recomputes_alone(office: Office, tmp_path: Path) -> None:
    await office.publish(served(office, "gen-1", 1000))
    await office.until("SELECT count(*) FROM usage_records WHERE work_key LIKE 'gen-1:%'", 1)
    assert "ledger ok: 2 transactions, 1 usage records, 0 holds, 0 invoices" in await office.run("verify")
    assert json.loads(await office.run("verify", "--all", "--json"))["done"] is True
    journal, book = tmp_path / "journal.jsonl", tmp_path / "journal.beancount"
    assert "2 transactions" in await office.run("export-journal", "-o", str(journal))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal.jsonl"]
    first, second = (json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines())
    assert (first["kind"], second["kind"], second["position"]) == ("top_up", "inference", "2")
    assert json.loads(await office.run("export-journal", "-o", "-", "--after-position", "1")) == second

    # Without any server.
    nowhere: dict[str, Any] = {"FINEMESH_ADDRESS": "http://127.0.0.1:1", "FINEMESH_API_KEY": "none"}
    alone = await office.run("verify", "--offline", str(journal), **nowhere)
    assert f"head {second['hash']}" in alone
    assert "prepaid $20.00, receivable -$0.00005, revenue $0.00005" in alone
    journal.write_text(journal.read_text(encoding="utf-8").replace('"50000"', '"60000"'), encoding="utf-8")
    assert "sum of postings: transaction 2" in await office.run("verify", "--offline", str(journal), code=1, **nowhere)

    await office.run("export-journal", "--format", "beancount", "-o", str(book))
    assert await _run(BEAN_CHECK, "--no-cache", str(book)) == ""
    book.write_text(book.read_text(encoding="utf-8").replace("0.000050000 USD", "0.000050001 USD", 1), encoding="utf-8")
    assert "does not balance" in await _run(BEAN_CHECK, "--no-cache", str(book), code=1)
    assert "beginning" in await office.run(
        "export-journal", "--format", "beancount", "--after-position", "1", "-o", "-", code=2
    )


async def test_dead_letters_are_listed_and_run_again(office: Office) -> None:
    await office.publish(served(office, "gen-bad", -1))
    await office.until("SELECT count(*) FROM dead_letters", 1)
    (letter,) = json.loads(await office.run("dead-letters", "list", "--json"))
    assert (letter["reason"], json.loads(letter["event_json"])["records"][0]["work_key"]) == (
        "EVENT_INVALID",
        "gen-bad",
    )
    assert letter["event_id"] in await office.run("dead-letters", "list")
    assert "input_tokens must be from 0" in await office.run("dead-letters", "replay", letter["event_id"], code=1)
    assert "input_tokens must be from 0" in await office.run("dead-letters", "replay", "--all", code=1)
    assert json.loads(await office.run("dead-letters", "list", "--json"))[0]["failures"] == 3
    assert "NOT_FOUND" in await office.run("dead-letters", "replay", str(uuid.uuid4()), code=1)
    assert "--all" in await office.run("dead-letters", "replay", code=2)


async def test_a_difference_is_printed_and_fails_the_command(office: Office) -> None:
    name = office.stack.environment("billing")["FINEMESH_BILLING_DATABASE_URL"]
    owner = await asyncpg.connect(name)
    # The owner of the tables needs no superuser to get past his own triggers: verification is what tells.
    await owner.execute("ALTER TABLE usage_sums DISABLE TRIGGER USER; UPDATE usage_sums SET quantity = quantity + 1")
    said = await office.run("verify", code=1)
    assert "usage sums: organizations/" in said
    assert "expected quantity 1000," in said
    assert "found    quantity 1001," in said
    await owner.execute("UPDATE usage_sums SET quantity = quantity - 1; ALTER TABLE usage_sums ENABLE TRIGGER USER")
    await owner.close()
    assert "ledger ok" in await office.run("verify")
