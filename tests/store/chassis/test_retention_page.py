"""Every table has a rule in docs/retention.md, for ever with a reason or by a setting that its service has."""

import re
from pathlib import Path

import pytest

from chassis.db.migrations import migrate
from chassis.db.pool import open_pool
from chassis.settings import ChassisSettings
from services.billing.config import BillingSettings
from services.gateway.config import GatewaySettings
from services.inference.config import InferenceSettings
from services.scheduler.config import SchedulerSettings
from tests.harness.schemas import CHASSIS_TABLES, stored_tables
from tests.harness.servers import PostgresServer

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/retention.md").read_text(encoding="utf-8")
SERVICES: dict[str, type[ChassisSettings]] = {
    "gateway": GatewaySettings,
    "scheduler": SchedulerSettings,
    "billing": BillingSettings,
    "inference": InferenceSettings,
}
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| (.*?) ?\|$", re.MULTILINE)
SETTING = re.compile(r"`(\w+_(?:s|bytes_max|max))`")


def rules(heading: str) -> dict[str, str]:
    """How long each table under this heading is kept."""
    section = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return {table: kept for table, kept, _ in ROW.findall(section)}


def is_a_rule(kept: str, settings: type[ChassisSettings]) -> bool:
    named = SETTING.findall(kept)
    for_ever = re.search(r"for ever: \w+", kept) is not None
    until = kept.startswith(("until ", "while "))
    return all(name in settings.model_fields for name in named) and (bool(named) or for_ever or until)


@pytest.mark.parametrize("service", SERVICES)
async def test_every_table_of_a_service_has_a_rule(postgres: PostgresServer, service: str) -> None:
    async with postgres.scratch() as url:
        pool = await open_pool(SERVICES[service](database_url=url))
        await migrate(pool, [ROOT / "services" / service / "migrations"])
        tables = await stored_tables(pool)
        await pool.close()
    assert rules(service).keys() == tables.keys()


def test_every_table_of_the_chassis_has_a_rule() -> None:
    assert rules("Tables of every service").keys() == set(CHASSIS_TABLES)


@pytest.mark.parametrize("heading", ["Tables of every service", *SERVICES])
def test_every_rule_names_a_setting_or_a_reason(heading: str) -> None:
    settings = SERVICES.get(heading, ChassisSettings)
    assert [(table, kept) for table, kept in rules(heading).items() if not is_a_rule(kept, settings)] == []


def test_a_rule_without_a_setting_or_a_reason_is_noticed() -> None:
    assert not is_a_rule("for a while", ChassisSettings)
    assert not is_a_rule("`no_such_retention_s` (7 days)", ChassisSettings)
    assert is_a_rule("`outbox_retention_s` (7 days)", ChassisSettings)
