"""What the settings of a run come to on its data: its steps, and what is known of them before it starts. Pure.

A warning stops nobody: what it names may be meant. What can never be meant is a violation.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from formats.learning_rates import LearningRateSchedule, learning_rate_at, warmup_steps
from formats.run_steps import evaluation_schedule, steps_of_epoch
from services.scheduler.spec.tuning_spec import EarlyStopping, Hyperparameters, Schedule, TuningSpec, Violation

# Steps at a rate of zero are told of where they are more than this part of the run.
IDLE_SHARE_MAX = 0.1
# A warm-up of more than this part leaves little of the run for its peak.
WARMUP_RATIO_MAX = 0.5
# With fewer steps a wave of the cosine is not seen.
STEPS_PER_CYCLE_MIN = 4
# A cosine that ends above this part of its peak has not come down.
END_SHARE_MAX = 0.5
# Examples that are cut lose their end, and with it where an answer ends; more than this part of them is told.
TRUNCATED_SHARE_MAX = 0.05
_AT = "spec.hyperparameters"


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """A training file under the settings: its examples, those that are cut, the rows that steps are made of, and the
    sequences of these rows when they are packed. The last two are 0 where an earlier version of a trainer counted."""

    example_count: int
    truncated_count: int = 0
    row_count: int
    packed_count: int


@dataclass(frozen=True, kw_only=True)
class SettingWarning:
    """`field` is the path in the request; `description` says what will happen, `cure` what to set instead."""

    field: str
    description: str
    cure: str


@dataclass(frozen=True, kw_only=True)
class Outlook:
    sequence_count: int
    steps_per_epoch: int
    step_count: int
    warnings: tuple[SettingWarning, ...]


def outlook_of(spec: TuningSpec, size: DataSize) -> Outlook | None:
    """`spec` is complete. None where the number of its sequences is not known."""
    if not size.row_count or not size.packed_count:
        return None
    given = spec.hyperparameters
    sequence_count = size.packed_count if given.packing else size.row_count
    steps_per_epoch = steps_of_epoch(sequence_count, _sequences_per_step(given))
    return Outlook(
        sequence_count=sequence_count,
        steps_per_epoch=steps_per_epoch,
        step_count=steps_per_epoch * given.epochs,
        warnings=tuple(_warnings(spec, size, sequence_count, steps_per_epoch)),
    )


def violations_of_outlook(spec: TuningSpec, outlook: Outlook) -> list[Violation]:
    """Early stopping that can end nothing: evaluations that fall on one step are one verdict."""
    stopping, given = spec.hyperparameters.early_stopping, spec.hyperparameters
    if stopping is None or _last_verdicts(stopping, given, outlook.steps_per_epoch) >= stopping.patience:
        return []
    verdicts = min(given.evaluations, outlook.steps_per_epoch) * given.epochs
    return [
        Violation(
            field=f"{_AT}.early_stopping",
            description=f"could never end the run: it has {outlook.step_count} steps, so its evaluations fall on"
            f" {verdicts} of them, and patience {stopping.patience} after {stopping.warmup_evaluations} evaluations of"
            " warm-up needs more; lower batch_size, raise epochs, or leave early_stopping out",
        )
    ]


def _warnings(spec: TuningSpec, size: DataSize, sequence_count: int, steps_per_epoch: int) -> Iterator[SettingWarning]:
    given = spec.hyperparameters
    yield from _of_steps(given, sequence_count, steps_per_epoch * given.epochs)
    if size.truncated_count > TRUNCATED_SHARE_MAX * size.example_count:
        yield SettingWarning(
            field=f"{_AT}.sequence_tokens_max",
            description=f"{size.truncated_count} of {size.example_count} examples are cut at"
            f" {given.sequence_tokens_max} tokens: what is behind is not learned, nor where their last answers end",
            cure="raise it up to the limit of the model, or split long examples",
        )
    if given.packing and 1 < sequence_count == size.row_count and spec.method is None:
        yield SettingWarning(
            field=f"{_AT}.packing",
            description=f"packing changes nothing: no two of the {size.row_count} rows fit into a sequence of"
            f" {given.sequence_tokens_max} tokens",
            cure="raise sequence_tokens_max if rows were meant to share sequences",
        )
    yield from _of_rates(given, steps_per_epoch * given.epochs)
    if spec.validation_file and not given.evaluations:
        yield SettingWarning(
            field=f"{_AT}.evaluations",
            description="the validation file serves nothing: evaluations is 0, so the run is never evaluated",
            cure="set it to 1 for an evaluation at the end of each epoch, which is billed",
        )
    yield from _of_evaluations(given, steps_per_epoch)
    yield from _of_checkpoints(given, steps_per_epoch * given.epochs)
    if spec.gpu_count > _sequences_per_step(given):
        yield SettingWarning(
            field="spec.gpu_count",
            description=f"a step takes {_sequences_per_step(given)} sequences, so some of the {spec.gpu_count} GPUs"
            " have nothing to do",
            cure="take fewer GPUs or a larger batch_size",
        )


def _of_steps(given: Hyperparameters, sequence_count: int, step_count: int) -> Iterator[SettingWarning]:
    per_step = _sequences_per_step(given)
    smaller = _cure_of_few_steps(given)
    if step_count == 1:
        yield SettingWarning(
            field=f"{_AT}.batch_size",
            description=f"the whole run is one step: a batch of {per_step} takes {_all(sequence_count)} at once, and"
            " one update teaches hardly anything",
            cure=smaller,
        )
    elif per_step > sequence_count:
        yield SettingWarning(
            field=f"{_AT}.batch_size",
            description=f"a step would take {per_step} sequences, and there {_are(sequence_count)}: each of the"
            f" {step_count} epochs is one step",
            cure=smaller,
        )


def _of_rates(given: Hyperparameters, step_count: int) -> Iterator[SettingWarning]:
    schedule = LearningRateSchedule(
        type="linear" if given.schedule is Schedule.LINEAR else "cosine",
        min_lr_ratio=given.min_learning_rate_ratio,
        num_cycles=given.cycle_count,
    )
    warming = warmup_steps(step_count, given.warmup_ratio)
    if warming and warming > WARMUP_RATIO_MAX * step_count:
        yield SettingWarning(
            field=f"{_AT}.warmup_ratio",
            description=f"{warming} of {step_count} steps warm up, so the run is nearly over when the rate reaches its"
            " peak",
            cure=f"set it to at most {WARMUP_RATIO_MAX:g}; 0.03 to 0.1 is usual",
        )
    elif warming and step_count * IDLE_SHARE_MAX < 1:
        yield SettingWarning(
            field=f"{_AT}.warmup_ratio",
            description=f"a warm-up begins at a rate of zero, so the first of only {step_count} steps learns nothing",
            cure="set it to 0 for so short a run",
        )
    if schedule.type == "linear" or given.min_learning_rate_ratio == 1:
        return
    if step_count - warming < STEPS_PER_CYCLE_MIN * given.cycle_count and given.cycle_count > 0.5:
        yield SettingWarning(
            field=f"{_AT}.cycle_count",
            description=f"{given.cycle_count:g} waves in {step_count - warming} steps are too many to be seen",
            cure="set it to 0.5, or train for more steps",
        )
    elif learning_rate_at(step_count, step_count, 1.0, given.warmup_ratio, schedule) > END_SHARE_MAX:
        yield SettingWarning(
            field=f"{_AT}.cycle_count",
            description=f"{given.cycle_count:g} waves end near the peak, so the last steps are large ones",
            cure="set it to 0.5, 1.5 or 2.5, which end at the minimum",
        )


def _of_evaluations(given: Hyperparameters, steps_per_epoch: int) -> Iterator[SettingWarning]:
    if given.evaluations > steps_per_epoch:
        yield SettingWarning(
            field=f"{_AT}.evaluations",
            description=f"an epoch has {_steps(steps_per_epoch)}, so {given.evaluations - steps_per_epoch} of its"
            f" {given.evaluations} evaluations see the same weights as the one before, and are billed",
            cure=f"set it to at most {steps_per_epoch}",
        )
    stopping = given.early_stopping
    if stopping is not None and _last_verdicts(stopping, given, steps_per_epoch) == stopping.patience:
        yield SettingWarning(
            field=f"{_AT}.early_stopping",
            description="the patience can run out at the run's last evaluation only, so no step is saved; the best"
            " evaluation ships all the same",
            cure="raise evaluations or epochs, or lower patience",
        )


def _of_checkpoints(given: Hyperparameters, step_count: int) -> Iterator[SettingWarning]:
    if given.checkpoints > step_count:
        yield SettingWarning(
            field=f"{_AT}.checkpoints",
            description=f"the run has {_steps(step_count)}, so {given.checkpoints} checkpoints are {step_count}",
            cure=f"set it to at most {step_count}",
        )
    if given.checkpoint_interval_steps >= step_count > 1 == given.checkpoints:
        yield SettingWarning(
            field=f"{_AT}.checkpoint_interval_steps",
            description=f"the run has {_steps(step_count)}, so none is saved before its end, and a run that loses its"
            " node begins anew",
            cure=f"set it below {step_count}, or to 0 for about 20 over the run",
        )


def _last_verdicts(stopping: EarlyStopping, given: Hyperparameters, steps_per_epoch: int) -> int:
    """How many evaluations could count against the patience: the first only sets the best loss, those of the warm-up
    count nothing, and of several on one step only the first counts."""
    seen: set[int] = set()
    count = 0
    for number, step in evaluation_schedule(steps_per_epoch, given.epochs, given.evaluations):
        if step not in seen and seen and number > (stopping.warmup_evaluations or 0):
            count += 1
        seen.add(step)
    return count


def _cure_of_few_steps(given: Hyperparameters) -> str:
    ways = [
        "lower batch_size" if given.batch_size > 1 else "",
        "lower gradient_accumulation_steps" if given.gradient_accumulation_steps > 1 else "",
        "set packing to false, so that each row is a sequence of its own" if given.packing else "",
        "raise epochs",
    ]
    return ", or ".join(way for way in ways if way)


def _sequences_per_step(given: Hyperparameters) -> int:
    return given.batch_size * given.gradient_accumulation_steps


def _all(count: int) -> str:
    return "the only sequence" if count == 1 else f"all {count} sequences"


def _are(count: int) -> str:
    return f"is {count}" if count == 1 else f"are {count}"


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"
