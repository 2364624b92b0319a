"""`finemesh jobs create` and `models limits`: every option reaches the contract as it was given, and nothing
that was not given."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from finemesh.billing.v1 import billing_service_pb2
from finemesh.tuning.v1 import (
    tuning_job_event_pb2,
    tuning_job_pb2,
    tuning_limits_pb2,
    tuning_service_pb2,
    tuning_service_pb2_grpc,
)
from finemesh_client.billing import request_of
from finemesh_client.cli.main import app
from tests.unit.client.conftest import Serve

FILE = "projects/acme/files/file-1"
JOB = "projects/acme/tuningJobs/ft-1"

OUTLOOK = tuning_job_pb2.RunOutlook(
    sequence_count=9,
    steps_per_epoch=1,
    step_count=3,
    warnings=[
        tuning_job_pb2.SettingWarning(
            field="spec.hyperparameters.batch_size", description="each [epoch] is one step", cure="lower batch_size"
        )
    ],
)
WARNED = "warning hyperparameters.batch_size: each [epoch] is one step; lower batch_size"


class Mesh(tuning_service_pb2_grpc.TuningServiceServicer):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.created: list[tuning_service_pb2.CreateTuningJobRequest] = []
        self.limits = tuning_limits_pb2.TuningLimits(base_model="finemesh/demo", epochs_max=7)

    def CreateTuningJob(
        self, request: tuning_service_pb2.CreateTuningJobRequest, context: object
    ) -> tuning_service_pb2.CreateTuningJobResponse:
        self.created.append(request)
        job = tuning_job_pb2.TuningJob(name=JOB, spec=request.spec)
        return tuning_service_pb2.CreateTuningJobResponse(tuning_job=job)

    def QuoteTuningJob(
        self, request: tuning_service_pb2.QuoteTuningJobRequest, context: object
    ) -> tuning_service_pb2.QuoteTuningJobResponse:
        quote = tuning_service_pb2.QuoteTuningJobResponse(spec=request.spec, price_book_version="book")
        quote.spec.hyperparameters.epochs, quote.spec.hyperparameters.learning_rate = 3, 2e-4
        quote.outlook.CopyFrom(OUTLOOK)
        return quote

    def GetTuningJob(
        self, request: tuning_service_pb2.GetTuningJobRequest, context: object
    ) -> tuning_service_pb2.GetTuningJobResponse:
        job = tuning_job_pb2.TuningJob(name=request.name, outlook=OUTLOOK)
        job.spec.dpo.beta = 0.1
        job.spec.lora.rank = 4
        job.progress.CopyFrom(
            tuning_job_pb2.TuningProgress(
                step=8,
                step_count=9,
                reward_accuracy=0.875,
                reward_margin=0.25,
                best_step=4,
                best_validation_loss=0.5,
                stopped_early=True,
                balancing_loss=2.0625,
            )
        )
        return tuning_service_pb2.GetTuningJobResponse(tuning_job=job)

    def ListCheckpoints(
        self, request: tuning_service_pb2.ListCheckpointsRequest, context: object
    ) -> tuning_service_pb2.ListCheckpointsResponse:
        kept = tuning_job_event_pb2.Checkpoint(step=4, asked=True)
        return tuning_service_pb2.ListCheckpointsResponse(checkpoints=[kept, tuning_job_event_pb2.Checkpoint(step=6)])

    def GetTuningLimits(
        self, request: tuning_service_pb2.GetTuningLimitsRequest, context: object
    ) -> tuning_service_pb2.GetTuningLimitsResponse:
        assert request.model == "ft-1:4"
        return tuning_service_pb2.GetTuningLimitsResponse(limits=self.limits)


@pytest.fixture
def mesh(serve: Serve) -> Mesh:
    mesh = Mesh()
    serve(mesh, tuning_service_pb2_grpc.add_TuningServiceServicer_to_server)
    return mesh


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def created(mesh: Mesh, *arguments: str) -> tuning_job_pb2.TuningSpec:
    shown = run("jobs", "create", "-t", FILE, "--yes", *arguments)
    assert shown.exit_code == 0, shown.output
    return mesh.created[-1].spec


def test_nothing_is_sent_that_was_not_given(mesh: Mesh) -> None:
    wanted = tuning_job_pb2.TuningSpec(base_model="finemesh/demo", training_file=FILE)
    wanted.supervised.train_on_inputs = tuning_job_pb2.TRAIN_ON_INPUTS_AUTO
    wanted.lora.SetInParent()
    wanted.hyperparameters.learning_rate_schedule = tuning_job_pb2.LEARNING_RATE_SCHEDULE_COSINE
    assert created(mesh, "-m", "finemesh/demo") == wanted


def test_every_hyperparameter_has_an_option(mesh: Mesh) -> None:
    spec = created(
        mesh,
        *("-m", "m", "--epochs", "3", "--evaluations", "0", "--checkpoints", "4", "--checkpoint-steps", "5"),
        *("--max-tokens", "64", "--no-packing", "--batch-size", "6", "--accumulation", "2", "--learning-rate", "0.01"),
        *("--schedule", "linear", "--min-lr-ratio", "0.1", "--cycles", "1.5", "--warmup-ratio", "0.05"),
        *("--weight-decay", "0.02", "--max-grad-norm", "0", "--seed", "0"),
        *("--patience", "3", "--min-delta", "0.5", "--warmup-evaluations", "0"),
    )
    hyper = spec.hyperparameters
    assert hyper == tuning_job_pb2.Hyperparameters(
        epochs=3,
        evaluations=0,
        batch_size=6,
        learning_rate=0.01,
        warmup_ratio=0.05,
        learning_rate_schedule=tuning_job_pb2.LEARNING_RATE_SCHEDULE_LINEAR,
        min_learning_rate_ratio=0.1,
        weight_decay=0.02,
        gradient_norm_max=0.0,
        sequence_tokens_max=64,
        seed=0,
        checkpoint_interval_steps=5,
        cycle_count=1.5,
        gradient_accumulation_steps=2,
        packing=False,
        checkpoints=4,
        early_stopping=tuning_job_pb2.EarlyStopping(patience=3, min_delta=0.5, warmup_evaluations=0),
    )
    # `max` is sent as its own field; a field of the contract that no option sets would be missing in one of the two.
    named = {field.name for field, _ in hyper.ListFields()} | {"batch_size_max"}
    assert named == {field.name for field in hyper.DESCRIPTOR.fields}


def test_the_largest_batch_and_plain_early_stopping(mesh: Mesh) -> None:
    hyper = created(mesh, "-m", "m", "--batch-size", "max", "--early-stopping").hyperparameters
    assert (hyper.batch_size_max, hyper.batch_size) == (True, 0)
    assert hyper.HasField("early_stopping")
    assert hyper.early_stopping == tuning_job_pb2.EarlyStopping()


def test_preferences(mesh: Mesh) -> None:
    spec = created(
        mesh,
        *("-m", "m", "--method", "dpo", "--dpo-beta", "0.3", "--dpo-normalize-by-length", "--dpo-reference-free"),
        *("--rpo-alpha", "0.2", "--simpo-gamma", "0.4"),
    )
    assert spec.dpo == tuning_job_pb2.DpoMethod(
        beta=0.3, normalize_logratios_by_length=True, reference_free=True, rpo_alpha=0.2, simpo_gamma=0.4
    )
    plain = created(mesh, "-m", "m", "--method", "dpo")
    assert plain.WhichOneof("method") == "dpo"
    assert plain.dpo == tuning_job_pb2.DpoMethod()


def test_feedback(mesh: Mesh) -> None:
    weights = ("--desirable-weight", "1.5", "--undesirable-weight", "0.5")
    spec = created(mesh, *("-m", "m", "--method", "kto", "--kto-beta", "0.3"), *weights)
    assert spec.kto == tuning_job_pb2.KtoMethod(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    plain = created(mesh, "-m", "m", "--method", "kto")
    assert plain.WhichOneof("method") == "kto"
    assert plain.kto == tuning_job_pb2.KtoMethod()


def test_a_continued_job_trains_what_that_one_trained_unless_told_otherwise(mesh: Mesh) -> None:
    spec = created(mesh, "--from", "ft-1:4")
    assert (spec.from_checkpoint, spec.base_model, spec.WhichOneof("weights")) == ("ft-1:4", "", None)
    assert created(mesh, "--from", "ft-1", "--lora").WhichOneof("weights") == "lora"
    assert created(mesh, "--from", "ft-1", "--full").WhichOneof("weights") == "full"
    lora = created(mesh, "--from", "ft-1", "--rank", "4", "--target", "q_proj", "--target", "v_proj").lora
    assert (lora.rank, list(lora.target_modules)) == (4, ["q_proj", "v_proj"])


def test_secrets_come_from_the_environment_or_a_file_and_only_when_asked_for(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "key-of-the-shell")
    monkeypatch.setenv("HF_TOKEN", " hf_of-the-shell\n")
    created(mesh, "-m", "m")
    assert not mesh.created[-1].HasField("secrets") or mesh.created[-1].secrets.ByteSize() == 0
    spec = created(mesh, "-m", "m", "--wandb-project", "p", "--wandb-name", "n", "--hf-push-to", "acme/tuned")
    assert (spec.integrations.wandb.project, spec.integrations.wandb.run_name) == ("p", "n")
    assert spec.integrations.hub_push.repository == "acme/tuned"
    secrets = mesh.created[-1].secrets
    assert (secrets.wandb_api_key, secrets.hub_token) == ("key-of-the-shell", "hf_of-the-shell")
    file = tmp_path / "token"
    file.write_text("hf_of-a-file\n")
    created(mesh, "-m", "m", "--hf-push-to", "acme/tuned", "--hf-token-file", str(file))
    secrets = mesh.created[-1].secrets
    assert (secrets.wandb_api_key, secrets.hub_token) == ("", "hf_of-a-file")


def test_a_start_from_the_hub_brings_the_token_that_there_is(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    spec = created(mesh, "-m", "m", "--from-hf-model", "acme/start", "--hf-model-revision", "v2")
    assert (spec.base_model, spec.from_hub.repository, spec.from_hub.revision) == ("m", "acme/start", "v2")
    assert mesh.created[-1].secrets.hub_token == ""
    monkeypatch.setenv("HF_TOKEN", "hf_of-the-shell")
    spec = created(mesh, "-m", "m", "--from-hf-model", "acme/start")
    assert (spec.from_hub.revision, mesh.created[-1].secrets.hub_token) == ("", "hf_of-the-shell")
    assert not created(mesh, "-m", "m").HasField("from_hub")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--from-hf-model", "a/b", "--from", "ft-1"), "excludes --from"),
        (("--hf-model-revision", "v2"), "only with --from-hf-model"),
        (("--hf-push-to", "a/b"), "set HF_TOKEN or --hf-token-file"),
        (("--hf-token-file", "x"), "only with --hf-push-to"),
        (("--wandb-key-file", "x"), "only with --wandb-project"),
        (("--hf-push-to", "a/b", "--hf-token-file", "/nowhere/x"), "cannot be read as a token"),
        (("--hf-push-to", "a/b", "--hf-token-file", "/dev/zero"), "which is no token"),
    ],
)
def test_a_secret_without_use_or_a_use_without_a_secret_is_refused_here(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], told: str
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    shown = run("jobs", "create", "-t", FILE, "-m", "m", "--yes", *arguments)
    assert shown.exit_code == 2
    assert told in re.sub(r"[\s│]+", " ", shown.output)
    assert mesh.created == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "give --model, or --from"),
        (("-m", "m", "--dpo-beta", "0.1"), "--dpo-beta: only with --method dpo"),
        (("-m", "m", "--simpo-gamma", "0", "--dpo-reference-free"), "--dpo-reference-free, --simpo-gamma: only with"),
        (("-m", "m", "--method", "dpo", "--train-on-inputs", "true"), "only with --method sft"),
        (("-m", "m", "--full", "--rank", "4"), "--full trains all weights"),
        (("-m", "m", "--full", "--lora"), "--full trains all weights"),
        (("-m", "m", "--batch-size", "many"), "give a number of sequences, or max"),
        (("-m", "m", "--method", "dpo", "--kto-beta", "0"), "--kto-beta: only with --method kto"),
        (("-m", "m", "--method", "kto", "--train-on-inputs", "true"), "only with --method sft"),
        (("-m", "m", "--method", "ppo"), "must be one of sft, dpo, kto"),
    ],
)
def test_options_that_contradict_each_other_never_reach_the_server(
    mesh: Mesh, arguments: tuple[str, ...], told: str
) -> None:
    shown = run("jobs", "create", "-t", FILE, "--yes", *arguments)
    assert shown.exit_code == 2
    assert told in re.sub(r"[\s│]+", " ", shown.output)
    assert mesh.created == []


def test_a_job_tells_its_method_rewards_and_best_evaluation(mesh: Mesh) -> None:
    shown = re.sub(r" +", " ", run("jobs", "get", JOB).output)
    assert "method dpo, adapter of rank 4" in shown
    assert "held-out rewards 88% right, margin 0.2500" in shown
    assert "best held-out loss 0.5000 after step 4, stopped early" in shown
    assert "balancing loss 2.0625" in shown


@pytest.mark.parametrize(
    "command",
    [
        ("jobs", "create", "-t", FILE, "-m", "finemesh/demo", "--quote"),
        ("billing", "estimate", "-f", FILE, "-m", "finemesh/demo"),
    ],
)
def test_a_quote_tells_the_run_and_what_will_surprise(mesh: Mesh, command: tuple[str, ...]) -> None:
    shown = run(*command)
    assert shown.exit_code == 0, shown.output
    assert "steps: 3 x 1 = 3; learning rate 0.0002" in shown.output
    assert WARNED in shown.output
    told = json.loads(run(*command, "--json").output)
    assert told["outlook"]["warnings"][0]["field"] == "spec.hyperparameters.batch_size"


def test_a_job_keeps_its_warnings(mesh: Mesh) -> None:
    assert WARNED in run("jobs", "get", JOB).output


def test_checkpoints_say_which_of_them_stay(mesh: Mesh) -> None:
    rows = [line.replace("│", " ").split() for line in run("jobs", "checkpoints", JOB).output.splitlines()]
    assert ["4", "yes"] in [row[:2] for row in rows]
    assert ["6", "until", "a", "newer", "one"] in [row[:5] for row in rows]


def test_limits_are_shown_and_what_is_not_offered_is_said(mesh: Mesh) -> None:
    mesh.limits.lora.rank_max = 64
    mesh.limits.lora.batch.max_supervised = 1024
    shown = re.sub(r" +", " ", run("models", "limits", "ft-1:4").output)
    assert "epochs 1 to 7" in shown
    assert "adapter rank 1 to 64" in shown
    assert "all weights not offered" in shown
    assert "methods sft\n" in shown
    assert "tools not known" in shown
    mesh.limits.supports_tools, mesh.limits.supports_reasoning = True, False
    shown = re.sub(r" +", " ", run("models", "limits", "ft-1:4").output)
    assert "tools rendered by the chat template" in shown
    assert "reasoning not rendered" in shown
    mesh.limits.supports_dpo = True
    mesh.limits.lora.batch.max_dpo = 32
    assert "to 32 pairs" in run("models", "limits", "ft-1:4").output
    assert json.loads(run("models", "limits", "ft-1:4", "--json").output)["lora"]["batch"]["max_dpo"] == 32


def test_a_quote_of_preferences_is_priced_as_one_in_other_books() -> None:
    quote = tuning_service_pb2.QuoteTuningJobResponse()
    quote.spec.dpo.SetInParent()
    quote.spec.full.SetInParent()
    assert request_of(quote).training_kind == billing_service_pb2.TRAINING_KIND_DPO_FULL
