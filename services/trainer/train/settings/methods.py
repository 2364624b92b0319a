"""Settings of preference learning, of early stopping and of a start from earlier weights: frozen and bounded.

It reads no file and knows no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from formats.rows import Format
from services.trainer.train.settings.json_reader import Reader

BETA_DEFAULT = 0.1
BETA_MAX = 10.0
RPO_ALPHA_MAX = 10.0
SIMPO_GAMMA_MAX = 10.0
FEEDBACK_WEIGHT_MAX = 100.0
PATIENCE_MAX = 100
MIN_DELTA_MAX = 100.0
WARMUP_EVALUATIONS_MAX = 100


@dataclass(frozen=True, kw_only=True)
class Dpo:
    """The settings of losses/preference_loss.py. Zero turns `rpo_alpha` and `simpo_gamma` off."""

    dataset_format: ClassVar[Format] = "preference"
    compares_mismatched: ClassVar[bool] = False

    beta: float = BETA_DEFAULT
    normalize_logratios_by_length: bool = False
    reference_free: bool = False
    rpo_alpha: float = 0.0
    simpo_gamma: float = 0.0

    @property
    def by_length(self) -> bool:
        return self.normalize_logratios_by_length or self.simpo_gamma > 0

    @property
    def needs_reference(self) -> bool:
        return not (self.reference_free or self.simpo_gamma > 0)

    @classmethod
    def read(cls, reader: Reader) -> "Dpo":
        return cls(
            beta=reader.number("beta", 0.0, BETA_MAX, BETA_DEFAULT, above_low=True),
            normalize_logratios_by_length=reader.flag("normalize_logratios_by_length", False),
            reference_free=reader.flag("reference_free", False),
            rpo_alpha=reader.number("rpo_alpha", 0.0, RPO_ALPHA_MAX, 0.0),
            simpo_gamma=reader.number("simpo_gamma", 0.0, SIMPO_GAMMA_MAX, 0.0),
        )


@dataclass(frozen=True, kw_only=True)
class Kto:
    """The settings of losses/kto.py: `beta`, and the weights of answers with thumbs up and with thumbs down."""

    dataset_format: ClassVar[Format] = "feedback"
    compares_mismatched: ClassVar[bool] = True

    beta: float = BETA_DEFAULT
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def needs_reference(self) -> bool:
        return True

    @classmethod
    def read(cls, reader: Reader) -> "Kto":
        return cls(
            beta=reader.number("beta", 0.0, BETA_MAX, BETA_DEFAULT, above_low=True),
            desirable_weight=reader.number("desirable_weight", 0.0, FEEDBACK_WEIGHT_MAX, 1.0, above_low=True),
            undesirable_weight=reader.number("undesirable_weight", 0.0, FEEDBACK_WEIGHT_MAX, 1.0, above_low=True),
        )


MethodSettings = Dpo | Kto
# Methods with settings and a dataset format of their own, by name. Every other format is for SUPERVISED.
METHODS: Mapping[str, type[MethodSettings]] = {"dpo": Dpo, "kto": Kto}
SUPERVISED = "sft"


def method_of_format(name: str) -> str:
    """The method that learns from files of a format."""
    return next((method for method, kind in METHODS.items() if kind.dataset_format == name), SUPERVISED)


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """The run ends after `patience` evaluations in a row that are not better than the best by more than `min_delta`
    nats; the first `warmup_evaluations` count nothing. The weights of the best evaluation ship."""

    patience: int
    min_delta: float
    warmup_evaluations: int

    @property
    def evaluations_min(self) -> int:
        """With fewer evaluations it could never end a run."""
        return self.patience + self.warmup_evaluations + 1


@dataclass(frozen=True, kw_only=True)
class StartFrom:
    """Weights of an earlier job in `directory`: a checkpoint of it (`step`), or the model that it made (`revision`); or
    those of a `repository` of a model hub at one commit (`revision`). `sha256` is the digest of their files'
    digests."""

    directory: str
    tuning_job: str
    step: int
    revision: str
    sha256: str
    repository: str = ""

    @property
    def named(self) -> str:
        return self.repository or self.tuning_job or "the earlier job"


def read_method_settings(parent: Reader) -> MethodSettings | None:
    """The settings of the method, in a field of its name; None for SUPERVISED. Those of other methods are refused."""
    method = parent.choice("method", (SUPERVISED, *METHODS), SUPERVISED)
    for name in METHODS:
        if name != method and parent.raw(name, None) is not None:
            parent.refuse(name, f'belongs to the method "{name}"')
    if method == SUPERVISED:
        return None
    reader = parent.child(method, {})
    settings = METHODS[method].read(reader)
    reader.finish()
    return settings


def read_early_stopping(parent: Reader) -> EarlyStopping | None:
    if parent.raw("early_stopping", None) is None:
        return None
    reader = parent.child("early_stopping")
    stopping = EarlyStopping(
        patience=reader.integer("patience", 1, PATIENCE_MAX, 2),
        min_delta=reader.number("min_delta", 0.0, MIN_DELTA_MAX, 0.0),
        warmup_evaluations=reader.integer("warmup_evaluations", 0, WARMUP_EVALUATIONS_MAX, 1),
    )
    reader.finish()
    return stopping


def refuse_idle_stopping(reader: Reader, stopping: EarlyStopping | None, evaluations_total: int) -> None:
    """Refuses early stopping that could never end a run of so many evaluations."""
    if stopping is not None and evaluations_total < stopping.evaluations_min:
        reader.refuse(
            "early_stopping",
            f"needs at least patience + warmup_evaluations + 1 = {stopping.evaluations_min} evaluations over the run "
            f"on a validation file; there are {evaluations_total}",
        )


def read_start_from(parent: Reader, path_length_max: int) -> StartFrom | None:
    if parent.raw("start_from", None) is None:
        return None
    reader = parent.child("start_from")
    start = StartFrom(
        directory=reader.text("directory", path_length_max),
        tuning_job=reader.text("tuning_job", 300, ""),
        step=reader.integer("step", 0, 2**53, 0),
        revision=reader.text("revision", 200, ""),
        sha256=reader.text("sha256", 64, ""),
        repository=reader.text("repository", 200, ""),
    )
    reader.finish()
    return start
