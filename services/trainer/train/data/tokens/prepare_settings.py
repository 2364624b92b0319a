"""How a dataset is prepared: the settings that decide its tokens, the directories, and who hears of the progress."""

from collections.abc import Callable
from dataclasses import dataclass, field

from formats.prompts.model_folder import ModelFolder
from formats.row_errors import ERRORS_MAX
from services.trainer.train.data.tokens.chunks import ChunkRules
from services.trainer.train.settings.directories import Directories
from services.trainer.train.settings.failures import Violation, user_failure
from services.trainer.train.settings.limits import MAX_SEQ_LENGTH_DEFAULT
from services.trainer.train.settings.spec import TrainOnInputs


@dataclass(frozen=True, kw_only=True)
class PreparationProgress:
    """How far the reading of a file is."""

    file: str
    rows: int
    bytes_read: int
    bytes_total: int
    rows_per_second: float


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    max_seq_length: int
    packing: bool
    train_on_inputs: TrainOnInputs
    template_date: str
    errors_max: int = ERRORS_MAX
    directories: Directories = field(default_factory=Directories)
    # Called every few seconds of a long preparation.
    report: Callable[[PreparationProgress], None] | None = None

    def chunk_rules(self, folder: ModelFolder) -> ChunkRules:
        return ChunkRules(
            folder=folder,
            max_seq_length=self.max_seq_length,
            train_on_inputs=self.train_on_inputs,
            template_date=self.template_date,
            errors_max=self.errors_max,
        )


def resolve_max_seq_length(asked: int | None, folder: ModelFolder) -> int:
    """Raises Failure(user, INVALID_FIELD) when more is asked for than the model can see."""
    if asked is None:
        return min(folder.context_length, MAX_SEQ_LENGTH_DEFAULT)
    if asked > folder.context_length:
        limit = f"{folder.context_length}, the context of the base model (with longrope: of its short factors)"
        description = f"must be at most {limit}, not {asked}"
        violation = Violation(field="max_seq_length", description=description)
        raise user_failure("INVALID_FIELD", f"max_seq_length {description}", [violation])
    return asked
