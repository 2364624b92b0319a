"""Places outside of the mesh: what may be asked for, that secrets are wanted and fit, and
that sealed ones open for one job only."""

import pytest

from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.jobs.secret_box import SecretBox
from services.scheduler.spec.convert import spec_from_proto, spec_to_proto
from services.scheduler.spec.integrations import ProvidedSecrets, completed, violations_of
from services.scheduler.spec.tuning_spec import Integrations, Violation, Wandb

URLS = ("https://api.wandb.ai", "https://wandb.example")
NONE = ProvidedSecrets(wandb_api_key="", hub_token="")
BOTH = ProvidedSecrets(wandb_api_key="wandb-key", hub_token="hf-token")
ASKED = Integrations(wandb=Wandb(), hub_repository="acme/tuned")
KEY = "0123456789abcdef" * 3


def found(asked: Integrations, given: ProvidedSecrets | None = BOTH, *, wandb_offline: bool = False) -> list[Violation]:
    return violations_of(asked, given, urls_allowed=URLS, wandb_offline=wandb_offline)


def test_what_fits_is_taken() -> None:
    assert found(Integrations(), NONE) == []
    assert found(ASKED) == []
    named = Wandb(base_url="https://wandb.example/", project="p.1", entity="team_a", run_name="night run")
    assert found(Integrations(wandb=named, hub_repository="a/b-c.d_E")) == []


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (Integrations(wandb=Wandb(base_url="http://169.254.169.254"), hub_repository="a/b"), "wandb.base_url"),
        (
            Integrations(wandb=Wandb(base_url="https://api.wandb.ai.evil.example"), hub_repository="a/b"),
            "wandb.base_url",
        ),
        (Integrations(wandb=Wandb(project="../x"), hub_repository="a/b"), "wandb.project"),
        (Integrations(wandb=Wandb(entity="a b"), hub_repository="a/b"), "wandb.entity"),
        (Integrations(wandb=Wandb(run_name="x" * 129), hub_repository="a/b"), "wandb.run_name"),
        (Integrations(wandb=Wandb(run_name="two\nlines"), hub_repository="a/b"), "wandb.run_name"),
        (Integrations(wandb=Wandb(), hub_repository="only-a-name"), "hub_push.repository"),
        (Integrations(wandb=Wandb(), hub_repository="a/b/c"), "hub_push.repository"),
        (Integrations(wandb=Wandb(), hub_repository="a/../b"), "hub_push.repository"),
        (Integrations(wandb=Wandb(), hub_repository="a/b--c"), "hub_push.repository"),
        (Integrations(wandb=Wandb(), hub_repository=""), "hub_push.repository"),
    ],
)
def test_what_does_not_fit_is_named(asked: Integrations, field: str) -> None:
    assert [violation.field for violation in found(asked)] == [f"spec.integrations.{field}"]


def test_secrets_come_with_what_they_open_and_are_never_repeated() -> None:
    assert [violation.field for violation in found(ASKED, NONE)] == ["secrets.wandb_api_key", "secrets.hub_token"]
    assert [violation.field for violation in found(Integrations())] == ["secrets.wandb_api_key", "secrets.hub_token"]
    odd = ProvidedSecrets(wandb_api_key="two words", hub_token="t" * 513)
    told = found(ASKED, odd)
    assert [violation.field for violation in told] == ["secrets.wandb_api_key", "secrets.hub_token"]
    assert not any("two words" in violation.description or "ttt" in violation.description for violation in told)
    assert "wandb-key" not in repr(BOTH) + str(BOTH)


def test_runs_that_are_kept_as_files_need_no_key_and_quotes_no_secrets() -> None:
    assert found(Integrations(wandb=Wandb()), NONE, wandb_offline=True) == []
    assert found(ASKED, None) == []


def test_a_start_from_the_hub_may_bring_a_token_and_needs_none() -> None:
    def fields(asked: Integrations, given: ProvidedSecrets) -> list[str]:
        told = violations_of(asked, given, urls_allowed=URLS, wandb_offline=False, reads_hub=True)
        return [violation.field for violation in told]

    token = ProvidedSecrets(wandb_api_key="", hub_token="hf-token")
    assert fields(Integrations(), NONE) == fields(Integrations(), token) == []
    assert fields(Integrations(hub_repository="a/b"), token) == []
    assert fields(Integrations(hub_repository="a/b"), NONE) == ["secrets.hub_token"]
    assert fields(Integrations(), ProvidedSecrets(wandb_api_key="", hub_token="two words")) == ["secrets.hub_token"]


def test_defaults_are_filled_in() -> None:
    wandb = completed(ASKED, job_id="ft-1", urls_allowed=URLS).wandb
    assert wandb == Wandb(base_url=URLS[0], project="finemesh", entity="", run_name="ft-1")
    assert completed(Integrations(), job_id="ft-1", urls_allowed=URLS) == Integrations()


def test_the_spec_keeps_them_both_ways() -> None:
    message = tuning_job_pb2.TuningSpec(base_model="m", training_file="f")
    assert spec_from_proto(message).integrations == Integrations()
    message.integrations.wandb.project = "p"
    message.integrations.hub_push.repository = "a/b"
    asked = spec_from_proto(message)
    assert asked.integrations == Integrations(wandb=Wandb(project="p"), hub_repository="a/b")
    assert spec_to_proto(asked).integrations == message.integrations


def test_what_is_sealed_opens_with_its_key_and_under_its_name_only() -> None:
    box = SecretBox(KEY)
    sealed = box.seal(b"hf-token", "projects/a/tuningJobs/1")
    assert box.open(sealed, "projects/a/tuningJobs/1") == b"hf-token"
    assert b"hf-token" not in sealed
    assert box.seal(b"hf-token", "projects/a/tuningJobs/1") != sealed
    assert box.open(sealed, "projects/a/tuningJobs/2") is None
    assert SecretBox(KEY[::-1]).open(sealed, "projects/a/tuningJobs/1") is None
    assert box.open(sealed[:-1] + bytes([sealed[-1] ^ 1]), "projects/a/tuningJobs/1") is None
    assert box.open(b"", "projects/a/tuningJobs/1") is None


def test_a_key_that_somebody_typed_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 32 characters"):
        SecretBox("password")
