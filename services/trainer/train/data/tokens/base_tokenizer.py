"""The base model's tokenizer and chat template, with what is wrong with them as a failure of the user."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer, processors

from formats.prompts.faults import ModelFault
from formats.prompts.model_folder import ModelFolder, read_model_folder
from services.trainer.train.settings.failures import Failure, user_failure


def open_model_folder(directory: Path) -> ModelFolder:
    """Raises Failure(user, MODEL_INVALID)."""
    with models_fault():
        folder = read_model_folder(directory)
    eos_id_of(folder)
    return folder


def eos_id_of(folder: ModelFolder) -> int:
    """The token that ends what is learned without a template. Raises Failure(user, MODEL_INVALID)."""
    if folder.eos_id is None:
        raise user_failure(
            "MODEL_INVALID",
            "the base model names no end-of-sequence token: there is neither an eos_token in tokenizer_config.json nor "
            "an eos_token_id in config.json",
        )
    return folder.eos_id


@contextmanager
def models_fault() -> Iterator[None]:
    """Raises Failure(user, MODEL_INVALID) for a ModelFault in the block."""
    try:
        yield
    except ModelFault as fault:
        raise user_failure("MODEL_INVALID", f"the base model's {fault}") from fault


def no_template() -> Failure:
    return user_failure("MODEL_INVALID", "the base model has no chat template; use prompt/completion rows with it")


def without_offset_trimming(tokenizer: Tokenizer) -> Tokenizer:
    """A copy whose offsets cover every character. The byte-level post-processor cuts white space off them, and a token
    of nothing but white space at the edge of an answer would then seem to lie outside. Only for use without special
    tokens."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.post_processor = processors.Sequence([])
    return copy
