"""What each field of a LoRA adapter's config means here: read, of no account, or refused with a cure.

The fields are those of peft 0.21's LoraConfig (`peft/tuners/lora/config.py`). A field that this table does not have is
refused unless it is empty. It reads no file and knows no model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What decides what an adapter computes, and is honoured as peft does: see adapters.py.
READ_FIELDS = frozenset(
    {
        "peft_type", "task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters", "init_lora_weights",
    }
)  # fmt: skip
# What says where an adapter comes from, how it was trained, or how a refused field would work. Settings of an
# initialisation stay in the config after the adapter was converted to a plain one, where peft ignores them.
FREE_FIELDS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "runtime_config",
        "lora_dropout", "ensure_weight_tying", "megatron_core", "qalora_group_size", "eva_config", "corda_config",
        "lora_ga_config", "loftq_config",
    }
)  # fmt: skip

_CONVERT = (
    "save it as a plain adapter with peft,"
    " `model.save_pretrained(folder, path_initial_model_for_weight_conversion=START)`, where START is the adapter as it"
    " was before its training, and take that one"
)
_MERGE = "merge it into the weights with peft (`merge_and_unload`) and import the whole model"
_PLAIN = "train it again as a plain adapter"
_CHANGES_BASE = "its weights belong to base weights that peft changed, and the base model here stays as it is"

# Initialisations after which the saved weights are those of a plain adapter: the base weights are not touched.
PLAIN_INITIALISATIONS = frozenset({"gaussian", "eva", "orthogonal", "mica"})


@dataclass(frozen=True, kw_only=True)
class Refused:
    """`means` says in a few words what the setting does, `cure` what its owner can do."""

    means: str
    cure: str


INITIALISATIONS: Mapping[str, Refused] = {
    "pissa": Refused(means=f"PiSSA: {_CHANGES_BASE}", cure=_CONVERT),
    "olora": Refused(means=f"OLoRA: {_CHANGES_BASE}", cure=_CONVERT),
    "corda": Refused(means=f"CorDA: {_CHANGES_BASE}", cure=_CONVERT),
    "lora_ga": Refused(means=f"LoRA-GA: {_CHANGES_BASE}", cure=_CONVERT),
    "loftq": Refused(
        means="LoftQ: its weights make up for what a quantized base model lost, and the base model here has its own"
        " weights",
        cure=_MERGE,
    ),
}

REFUSED_FIELDS: Mapping[str, Refused] = {
    "use_dora": Refused(means="DoRA: magnitudes of the base weights are trained beside the two matrices", cure=_MERGE),
    "bias": Refused(means="biases of the base model are trained, too", cure=_MERGE),
    "lora_bias": Refused(means="the second matrix has a bias", cure=_MERGE),
    "fan_in_fan_out": Refused(means="for layers that keep their weights transposed, as GPT-2 does", cure=_MERGE),
    "modules_to_save": Refused(means="whole layers are trained beside the matrices", cure=_MERGE),
    "trainable_token_indices": Refused(means="rows of the vocabulary's weights are trained, too", cure=_MERGE),
    "layer_replication": Refused(means="layers of the base model come several times", cure=_MERGE),
    "alora_invocation_tokens": Refused(
        means="aLoRA: the adapter works only behind certain tokens, and here it works on all of them", cure=_PLAIN
    ),
    "use_qalora": Refused(means="QALoRA: inputs are pooled in groups, for a quantized base model", cure=_PLAIN),
    "use_bdlora": Refused(means="BD-LoRA: the matrices are block-diagonal", cure=_PLAIN),
    "monteclora_config": Refused(means="MonteCLoRA: the matrices are drawn at random", cure=_PLAIN),
    "kasa_config": Refused(means=f"KaSA: {_CHANGES_BASE}", cure=_PLAIN),
    "arrow_config": Refused(means="Arrow: several adapters are chosen token by token", cure=_PLAIN),
    "velora_config": Refused(means="VeLoRA: its files hold more than the two matrices", cure=_PLAIN),
    "megatron_config": Refused(means="for layers of Megatron, which are not those of the base model here", cure=_PLAIN),
}
# Switched on by any value but null and false, also by an empty one.
_VARIANTS = frozenset(
    {"alora_invocation_tokens", "use_bdlora", "monteclora_config", "kasa_config", "arrow_config", "velora_config"}
)


def refusal_of(field: str, value: Any) -> Refused | None:
    """Why this field may not have this value; None for one that says nothing, or is read."""
    if field in READ_FIELDS or field in FREE_FIELDS or value is None or value is False:
        return None
    known = REFUSED_FIELDS.get(field)
    if known is None:
        return None if _is_empty(value) else Refused(means="a setting that is not known here", cure=_PLAIN)
    if field in _VARIANTS:
        return known
    return None if _is_empty(value) or (field == "bias" and value == "none") else known


def refusal_of_initialisation(value: Any) -> Refused | None:
    """As `refusal_of`, for `init_lora_weights`."""
    if value is None or isinstance(value, bool):
        return None
    if not isinstance(value, str):
        return Refused(means="no initialisation of peft", cure="write true, which changes nothing for trained weights")
    name = value.lower()
    if name in PLAIN_INITIALISATIONS:
        return None
    for known, refused in INITIALISATIONS.items():
        # `pissa_niter_16`, `corda_...`
        if name == known or name.startswith(f"{known}_"):
            return refused
    return Refused(
        means="an initialisation that is not known here, and may belong to base weights that were changed",
        cure=_CONVERT,
    )


def _is_empty(value: Any) -> bool:
    return value in ("", 0) or (isinstance(value, list | dict | str) and not value)
