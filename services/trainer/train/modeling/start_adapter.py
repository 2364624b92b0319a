"""What the adapter that a run starts from says of itself: its layers, ranks and scales. It reads one file, no weights.

The run goes on with that very adapter, so all of it is kept. What means something else than two matrices and a scale is
refused, by the rule that serving has, too.
"""

from pathlib import Path

from formats.adapters import ADAPTER_CONFIG, ALL_LINEAR, RANK_MAX, AdapterRefused, LoraConfig, read_adapter_config
from services.trainer.train.settings.failures import Failure, user_failure
from services.trainer.train.settings.spec import LoraTraining, Spec


def adapter_of_start(spec: Spec) -> LoraConfig | None:
    """None for a run that starts from no adapter. Raises Failure(user, MODEL_INVALID) for one that is not taken, or
    that has another rank or alpha than this run says."""
    start, training = spec.start_from, spec.training
    if start is None or not isinstance(training, LoraTraining):
        return None
    path = Path(start.directory) / ADAPTER_CONFIG
    if not path.is_file() and not start.repository:
        # Shards of an earlier version; their shapes are compared.
        return None
    try:
        config = read_adapter_config(path.read_bytes(), rank_max=RANK_MAX)
    except OSError as error:
        raise unfit(spec, f"{ADAPTER_CONFIG} cannot be read: {error!s:.200}") from error
    except AdapterRefused as error:
        raise unfit(spec, str(error)) from error
    if config.rank != training.r:
        raise unfit(spec, f"the adapter's r is {config.rank}; this run's is {training.r}")
    # Whoever continues an own job may say another alpha; a stranger's adapter has the one that it was trained with.
    if start.repository and config.alpha != training.alpha:
        raise unfit(spec, f"the adapter's lora_alpha is {config.alpha:g}; this run's is {training.alpha}")
    return config


def follows(training: LoraTraining) -> bool:
    """Whether the run takes the layers of the adapter that it starts from; otherwise it names layers itself, and they
    must be the same."""
    return training.target_modules == ALL_LINEAR


def rank_of_run(spec: Spec) -> int | None:
    """The largest rank of any layer; None for a run of all weights."""
    if not isinstance(spec.training, LoraTraining):
        return None
    config = adapter_of_start(spec)
    largest: int = max([spec.training.r, *(config.rank_pattern.values() if config else ())])
    return largest


def unfit(spec: Spec, why: str) -> Failure:
    """The failure of a run whose start is not of this base model and these settings."""
    assert spec.start_from is not None
    return user_failure(
        "MODEL_INVALID",
        f"the weights of {spec.start_from.named} do not fit this base model and these settings: {why}",
    )
