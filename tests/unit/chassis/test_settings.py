"""Where a setting comes from, and that it cannot change afterwards."""

import pytest
from pydantic import ValidationError

from chassis.settings import ChassisSettings


class OvenSettings(ChassisSettings):
    service_name: str = "oven"
    heat_c_max: int = 200


@pytest.fixture(autouse=True)
def no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TLS_DIR", "NATS_URL", "OVEN_NATS_URL", "LOG_LEVEL"):
        monkeypatch.delenv(f"FINEMESH_{name}", raising=False)


def test_own_variables_win_over_shared_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OvenSettings().nats_url == "nats://127.0.0.1:4222"
    monkeypatch.setenv("FINEMESH_NATS_URL", "nats://shared:1")
    monkeypatch.setenv("FINEMESH_HEAT_C_MAX", "210")
    assert (OvenSettings().nats_url, OvenSettings().heat_c_max) == ("nats://shared:1", 210)
    monkeypatch.setenv("FINEMESH_OVEN_NATS_URL", "nats://own:1")
    assert OvenSettings().nats_url == "nats://own:1"
    assert OvenSettings(nats_url="nats://given:1").nats_url == "nats://given:1"


@pytest.mark.parametrize("name", ["LISTEN_ADDRESS", "PORT_FILE", "SERVICE_NAME"])
def test_what_belongs_to_one_process_is_not_shared(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = OvenSettings()
    monkeypatch.setenv(f"FINEMESH_{name}", "elsewhere")
    assert OvenSettings() == before


def test_a_name_with_a_dash_has_variables_with_an_underscore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINEMESH_BIG_OVEN_LOG_LEVEL", "debug")
    assert ChassisSettings(service_name="big-oven").log_level == "debug"


def test_settings_are_frozen_named_and_keep_their_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINEMESH_OVEN_DATABASE_URL", "postgresql://oven:hunter2@db/finemesh")
    settings = OvenSettings()
    assert settings.database_url.endswith("/finemesh")
    assert "hunter2" not in repr(settings)
    with pytest.raises(ValidationError):
        settings.heat_c_max = 1
    with pytest.raises(ValidationError):
        ChassisSettings()


def test_every_limit_says_what_it_limits() -> None:
    fields = ChassisSettings.model_fields.items()
    limits = [(name, field) for name, field in fields if name.endswith(("_max", "_s", "_min"))]
    assert len(limits) > 10
    assert [name for name, field in limits if not field.description] == []
