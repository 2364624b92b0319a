"""The options of `finemesh jobs create` that say what a job shall be; None means not given.

It fills no defaults and checks no ranges: the server does, and shows them in the quote. Numbers in brackets are the
server's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from finemesh.tuning.v1 import tuning_job_pb2 as pb
from finemesh_client.cli.datasets.preview_command import TRAIN_ON_INPUTS
from finemesh_client.cli.runtime import one_of
from finemesh_client.training_kinds import METHOD_FIELDS

SFT = "sft"
METHODS = tuple(METHOD_FIELDS)
# By method: the fields of its message in the contract, by the options that set them.
METHOD_SETTINGS = {
    "dpo": {
        "dpo_beta": "beta",
        "dpo_normalize_by_length": "normalize_logratios_by_length",
        "dpo_reference_free": "reference_free",
        "rpo_alpha": "rpo_alpha",
        "simpo_gamma": "simpo_gamma",
    },
    "kto": {
        "kto_beta": "beta",
        "desirable_weight": "desirable_weight",
        "undesirable_weight": "undesirable_weight",
    },
}
SCHEDULES = {
    "cosine": pb.LEARNING_RATE_SCHEDULE_COSINE,
    "linear": pb.LEARNING_RATE_SCHEDULE_LINEAR,
}
_DATA, _METHOD, _WEIGHTS, _LENGTH = "Data and model", "Method", "Weights", "Length and checkpoints"
_LEARNING, _STOPPING, _OUTSIDE = "Learning", "Early stopping", "Weights & Biases, Hugging Face hub"


def option(group: str, *names: str, **settings: Any) -> Any:
    """An option in a titled group of the help."""
    return typer.Option(*names, rich_help_panel=group, **settings)


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What the user gave. `batch_size` is a number or `max`."""

    training_file: Annotated[str, option(_DATA, "--training-file", "-t", help="File name from `files upload`.")]
    model: Annotated[str, option(_DATA, "--model", "-m", help="Base model id; see `finemesh models list`.")] = ""
    from_checkpoint: Annotated[
        str, option(_DATA, "--from", help="Continue a job or model, or one of its checkpoints: ft-...[:step].")
    ] = ""
    from_hf_model: Annotated[
        str,
        option(
            _DATA,
            "--from-hf-model",
            help="Start from owner/name of the hub, of the shape of --model; token in HF_TOKEN.",
        ),
    ] = ""
    hf_model_revision: Annotated[
        str, option(_DATA, "--hf-model-revision", help="Its commit, tag or branch (main).")
    ] = ""
    validation_file: Annotated[str, option(_DATA, "--validation-file", help="Held-out file.")] = ""
    output_name: Annotated[str, option(_DATA, "--name", help="Last part of the new model's id.")] = ""
    method: Annotated[
        str,
        option(
            _METHOD, "--method", callback=one_of(METHODS), help="sft: by examples; dpo: by preferences; kto: by thumbs."
        ),
    ] = SFT
    train_on_inputs: Annotated[
        str | None,
        option(_METHOD, "--train-on-inputs", callback=one_of(tuple(TRAIN_ON_INPUTS)), help="auto, true or false."),
    ] = None
    dpo_beta: Annotated[float | None, option(_METHOD, "--dpo-beta", help="Pull to the reference (0.1).")] = None
    dpo_normalize_by_length: Annotated[
        bool, option(_METHOD, "--dpo-normalize-by-length", help="Divide an answer's log-ratio by its tokens.")
    ] = False
    dpo_reference_free: Annotated[
        bool, option(_METHOD, "--dpo-reference-free", help="Compare the answers without a reference model.")
    ] = False
    rpo_alpha: Annotated[
        float | None, option(_METHOD, "--rpo-alpha", help="Weight of the preferred answer's likelihood (0).")
    ] = None
    simpo_gamma: Annotated[
        float | None, option(_METHOD, "--simpo-gamma", help="Margin; by length and without reference then (0).")
    ] = None
    kto_beta: Annotated[float | None, option(_METHOD, "--kto-beta", help="Pull to the reference (0.1).")] = None
    desirable_weight: Annotated[
        float | None, option(_METHOD, "--desirable-weight", help="Of the loss of answers with thumbs up (1).")
    ] = None
    undesirable_weight: Annotated[
        float | None, option(_METHOD, "--undesirable-weight", help="Of the loss of answers with thumbs down (1).")
    ] = None
    full: Annotated[bool, option(_WEIGHTS, "--full", help="Train all weights instead of a LoRA adapter.")] = False
    lora: Annotated[bool, option(_WEIGHTS, "--lora", help="Train an adapter; without --from the default.")] = False
    rank: Annotated[int | None, option(_WEIGHTS, "--rank", help="LoRA rank, 1 to 256 (16).")] = None
    alpha: Annotated[int | None, option(_WEIGHTS, "--alpha", help="LoRA alpha (twice the rank).")] = None
    dropout: Annotated[float | None, option(_WEIGHTS, "--dropout", help="LoRA dropout (0).")] = None
    target_modules: Annotated[
        list[str] | None, option(_WEIGHTS, "--target", help="Layer that gets an adapter; repeat it (all linear).")
    ] = None
    gpus: Annotated[int | None, option(_WEIGHTS, "--gpus", help="GPUs as one gang (1).")] = None
    epochs: Annotated[int | None, option(_LENGTH, "--epochs", help="Passes over the data (1).")] = None
    evaluations: Annotated[int | None, option(_LENGTH, "--evaluations", help="Evaluations per epoch (0).")] = None
    checkpoints: Annotated[int | None, option(_LENGTH, "--checkpoints", help="Checkpoints that are kept (1).")] = None
    checkpoint_interval_steps: Annotated[
        int | None, option(_LENGTH, "--checkpoint-steps", help="Steps between those for a restart.")
    ] = None
    sequence_tokens_max: Annotated[int | None, option(_LENGTH, "--max-tokens", help="Longest example.")] = None
    packing: Annotated[
        bool | None, option(_LENGTH, "--packing/--no-packing", help="Let short examples share a sequence (sft: yes).")
    ] = None
    batch_size: Annotated[
        str | None, option(_LEARNING, "--batch-size", help="Sequences per batch, or max for the model's limit (8).")
    ] = None
    gradient_accumulation_steps: Annotated[
        int | None, option(_LEARNING, "--accumulation", help="Batches per step (1).")
    ] = None
    learning_rate: Annotated[
        float | None,
        option(_LEARNING, "--learning-rate", help="Peak (2e-4; for dpo and kto 1e-5; with --full a tenth)."),
    ] = None
    schedule: Annotated[
        str, option(_LEARNING, "--schedule", callback=one_of(tuple(SCHEDULES)), help="cosine or linear.")
    ] = "cosine"
    min_learning_rate_ratio: Annotated[
        float | None, option(_LEARNING, "--min-lr-ratio", help="Last rate as a share of the peak (0).")
    ] = None
    cycle_count: Annotated[float | None, option(_LEARNING, "--cycles", help="Waves of the cosine (0.5).")] = None
    warmup_ratio: Annotated[float | None, option(_LEARNING, "--warmup-ratio", help="Share of steps (0).")] = None
    weight_decay: Annotated[float | None, option(_LEARNING, "--weight-decay", help="Decoupled, 0 to 1 (0).")] = None
    gradient_norm_max: Annotated[
        float | None, option(_LEARNING, "--max-grad-norm", help="Clip gradients to it; 0: never (1).")
    ] = None
    seed: Annotated[int | None, option(_LEARNING, "--seed", help="Seed (42).")] = None
    early_stopping: Annotated[
        bool, option(_STOPPING, "--early-stopping", help="End when evaluations stop getting better; the best ships.")
    ] = False
    patience: Annotated[int | None, option(_STOPPING, "--patience", help="Evaluations without an improvement (2).")] = (
        None
    )
    min_delta: Annotated[float | None, option(_STOPPING, "--min-delta", help="What counts as one (0).")] = None
    warmup_evaluations: Annotated[
        int | None, option(_STOPPING, "--warmup-evaluations", help="First ones that count nothing (1).")
    ] = None
    wandb_project: Annotated[
        str | None, option(_OUTSIDE, "--wandb-project", help="Send the curves there; key in WANDB_API_KEY.")
    ] = None
    wandb_entity: Annotated[str | None, option(_OUTSIDE, "--wandb-entity", help="Team or user (the key's).")] = None
    wandb_name: Annotated[str | None, option(_OUTSIDE, "--wandb-name", help="Name of the run (the job's id).")] = None
    wandb_url: Annotated[str | None, option(_OUTSIDE, "--wandb-url", help="A server that the mesh allows.")] = None
    wandb_key_file: Annotated[Path | None, option(_OUTSIDE, "--wandb-key-file", help="File with the key instead.")] = (
        None
    )
    hf_push_to: Annotated[
        str | None, option(_OUTSIDE, "--hf-push-to", help="Push the model to owner/name; token in HF_TOKEN.")
    ] = None
    hf_token_file: Annotated[Path | None, option(_OUTSIDE, "--hf-token-file", help="File with the token instead.")] = (
        None
    )
