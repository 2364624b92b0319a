"""Writes the model that ships: peft's adapter files, or a whole transformers folder. It knows no checkpoint."""

import shutil
from collections.abc import Collection
from pathlib import Path

from formats.prompts.answer_ends import add_ends
from services.trainer.train.export.exported_tokenizer import keep_tokens, keep_tokens_of_base
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.modeling.trained_weights import Tensors, write_trained_weights
from services.trainer.train.settings.spec import Spec

# What belongs to the tokenizer and the way of asking; weights and config are written by the model.
_COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "generation_config.json",
)  # fmt: skip


def write_export(
    model: CausalModel, spec: Spec, folder: Path, trained: Tensors | None = None, *, ends: Collection[int] = ()
) -> None:
    """An adapter for LoRA, with a tokenizer where that of its base is read in two ways; config, weights, tokenizer and
    chat template for full weights. `trained` are the weights by name where the model itself holds only a part of them.
    `ends` are the tokens that end an answer, for generation_config.json; none where the base's own says it already."""
    if spec.training.type == "lora":
        write_trained_weights(model, spec, folder, trained)
        keep_tokens_of_base(Path(spec.base_model.directory), folder)
    else:
        model.base.save_pretrained(str(folder), state_dict=trained)
        for name in _COMPANIONS:
            source = Path(spec.base_model.directory) / name
            if source.is_file():
                shutil.copyfile(source, folder / name)
        keep_tokens(folder)
    if ends:
        add_ends(folder, ends)
