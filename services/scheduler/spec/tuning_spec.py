"""What a tuning job may ask for, as types and bounds. It knows no protobuf and asks nobody.

What is wrong with a request is said by violations.py; what is left out is filled in by defaults.py.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from services.scheduler.spec.tuning_methods import Method

EPOCHS_MAX = 100
EVALUATIONS_MAX = 100
CHECKPOINTS_MAX = 100
BATCH_SIZE_MAX = 4096
GRADIENT_ACCUMULATION_STEPS_MAX = 256
CYCLE_COUNT_MAX = 10.0
PATIENCE_MAX = 100
PATIENCE_DEFAULT = 2
MIN_DELTA_MAX = 100.0
WARMUP_EVALUATIONS_DEFAULT = 1
WARMUP_EVALUATIONS_MAX = 100
LEARNING_RATE_MAX = 1.0
GRADIENT_NORM_MAX = 1000.0
CHECKPOINT_INTERVAL_STEPS_MAX = 1_000_000
SEQUENCE_TOKENS_MIN = 16
SEQUENCE_TOKENS_MAX = 131_072
LORA_RANK_MAX = 256
LORA_ALPHA_MAX = 1024
LORA_DROPOUT_MAX = 0.9
TARGET_MODULES_MAX = 64
SEED_MAX = 2**32 - 1
GPU_COUNT_MAX = 1024
MODEL_ID_CHARS_MAX = 200

# Stands for an empty list of target modules.
ALL_LINEAR = "all-linear"

OUTPUT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
MODULE_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")
# As the hub itself names repositories; `--` and `..` it does not take.
HUB_REPOSITORY = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?<![-.])")
HUB_REVISION = re.compile(r"(?!.*(\.\.|//))[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


class TrainOnInputs(StrEnum):
    AUTO = "auto"
    TRUE = "true"
    FALSE = "false"


class Schedule(StrEnum):
    COSINE = "cosine"
    LINEAR = "linear"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Zero rank and zero alpha stand for the defaults."""

    rank: int = 0
    alpha: int = 0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Zero patience and None stand for the defaults."""

    patience: int = 0
    min_delta: float = 0.0
    warmup_evaluations: int | None = None

    @property
    def evaluations_min(self) -> int:
        """With fewer it could never end a run."""
        warmup = WARMUP_EVALUATIONS_DEFAULT if self.warmup_evaluations is None else self.warmup_evaluations
        return (self.patience or PATIENCE_DEFAULT) + warmup + 1


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Zero (None where zero has a meaning) stands for the default."""

    epochs: int = 0
    evaluations: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    warmup_ratio: float = 0.0
    schedule: Schedule | None = Schedule.COSINE
    min_learning_rate_ratio: float = 0.0
    weight_decay: float = 0.0
    gradient_norm_max: float | None = None
    sequence_tokens_max: int = 0
    seed: int | None = None
    checkpoint_interval_steps: int = 0
    cycle_count: float = 0.0
    gradient_accumulation_steps: int = 0
    packing: bool | None = None
    checkpoints: int = 0
    batch_size_max: bool = False
    early_stopping: EarlyStopping | None = None


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """A run in Weights & Biases. Empty strings stand for the defaults."""

    base_url: str = ""
    project: str = ""
    entity: str = ""
    run_name: str = ""


@dataclass(frozen=True, kw_only=True)
class Integrations:
    """None: not asked for. `hub_repository` is `{owner}/{name}`."""

    wandb: Wandb | None = None
    hub_repository: str | None = None


@dataclass(frozen=True, kw_only=True)
class HubStart:
    """A repository of the hub, `{owner}/{name}`, at a commit, tag or branch; an empty one is the hub's default."""

    repository: str
    revision: str = ""


@dataclass(frozen=True, kw_only=True)
class TuningSpec:
    """The request as it came, or with every default filled in.

    `lora` None trains all weights; `method` None is supervised tuning; an enum that the contract does not know is None.
    `weights_given` is False when nothing was said about which weights to train: a run that continues another one trains
    the same.
    """

    base_model: str
    training_file: str
    validation_file: str = ""
    output_name: str = ""
    train_on_inputs: TrainOnInputs | None = TrainOnInputs.AUTO
    method: Method | None = None
    lora: Lora | None = Lora()
    weights_given: bool = True
    hyperparameters: Hyperparameters = Hyperparameters()
    gpu_count: int = 0
    from_checkpoint: str = ""
    from_hub: HubStart | None = None
    integrations: Integrations = Integrations()


@dataclass(frozen=True, kw_only=True)
class Violation:
    """`field` is the path in the request, for example `spec.hyperparameters.epochs`."""

    field: str
    description: str
