"""Makes the weights of a recipe: a seeded random model, pre-trained for a moment on docstrings.

It learns plain text and conversations. The conversations ask for a continuation, or for the first or the last word. No
question about where a text comes from is among them, and no file or module is ever named. It knows no job and no
settings.
"""

import random
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from formats.learning_rates import LearningRateSchedule, learning_rate_at
from formats.row_errors import RowErrors
from formats.rows import Conversation, Instruction, Message
from services.trainer.train.data.batches.micro_batch import micro_batches
from services.trainer.train.data.packing.shuffle import epoch_order
from services.trainer.train.data.tokens.base_tokenizer import open_model_folder
from services.trainer.train.data.tokens.row_tokenizer import RowTokenizer
from services.trainer.train.data.tokens.template import ChatTemplate
from services.trainer.train.data.tokens.token_rows import TokenRows
from services.trainer.train.losses.objective import Supervised
from services.trainer.train.modeling.attention import plain_attention
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.modeling.optimizer import make_optimizer, set_learning_rate
from services.trainer.train.recipes.model_shapes import Recipe
from services.trainer.train.recipes.vocabulary import BEGIN_ID, END_ID, PAD_ID
from services.trainer.train.settings.limits import TEMPLATE_DATE_DEFAULT

THREADS = 2
ROW_TOKENS_MAX = 192
STEP_TOKENS = 1024
LEARNING_RATE = 8e-3
WARMUP_RATIO = 0.05
WEIGHT_DECAY = 0.05
REPORT_EVERY_STEPS = 20
# A logit is at most the length of the last hidden state times that of an embedding. With 128 dimensions and ones in the
# final norm that is about 11, too little to spread a guess over ten of two thousand tokens: an adapter, which can
# lengthen neither, then never learns the choice. Large models have this room by their width.
FINAL_NORM = 3.0
EXCERPT_CHARACTERS = 240
QUESTION_WORDS_MIN = 8

Report = Callable[[str], None]


def write_weights(recipe: Recipe, files: list[list[str]], folder: Path, report: Report) -> None:
    """Writes config and float32 weights beside the tokenizer files that are in `folder` already."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(recipe.seed)
    config = AutoConfig.for_model(
        recipe.model_type,
        vocab_size=recipe.vocabulary,
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
        **recipe.config,
    )
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=plain_attention(config))
    if recipe.pretrain_steps:
        with torch.no_grad():
            module.model.norm.weight.fill_(FINAL_NORM)
    module.generation_config = GenerationConfig(bos_token_id=BEGIN_ID, eos_token_id=END_ID, pad_token_id=PAD_ID)
    with torch.no_grad():
        module.get_input_embeddings().weight.mul_(recipe.embedding_scale)
    # The config is what tells the tokenizer's rows where the model ends.
    config.save_pretrained(str(folder))
    if recipe.pretrain_steps:
        _pretrain(module, recipe, training_rows(recipe, files, folder), report)
    module.save_pretrained(str(folder))


def training_rows(recipe: Recipe, files: list[list[str]], folder: Path) -> list[TokenRows]:
    """Texts and conversations. All tokens carry loss: a language model of the text and of the form of a
    conversation."""
    opened = open_model_folder(folder)
    template = ChatTemplate.of(opened, date.fromisoformat(TEMPLATE_DATE_DEFAULT))
    tokenizer = RowTokenizer(opened, template, train_on_inputs=True)
    dice = random.Random(recipe.seed)  # noqa: S311 - picks examples, guards nothing
    texts = [text for texts in files for text in texts]
    plain = [Instruction(line=0, prompt="", completion=text) for text in texts]
    chats = [_conversation(text, dice) for text in texts if len(text.split()) >= QUESTION_WORDS_MIN]
    return [tokenizer.tokenize(rows, ROW_TOKENS_MAX, RowErrors()) for rows in (plain, chats)]


def _conversation(text: str, dice: random.Random) -> Conversation:
    words = text.split()
    start = text[:EXCERPT_CHARACTERS]
    question, answer = dice.choice(
        (
            (f"Continue this text:\n{' '.join(words[: len(words) // 2])}", " ".join(words[len(words) // 2 :])),
            (f"What is the first word of this text? Answer with that word.\n{start}", start.split()[0]),
            (f"What is the last word of this text? Answer with that word.\n{start}", start.split()[-1]),
        )
    )
    turns = (Message(role="user", content=question), Message(role="assistant", content=answer))
    return Conversation(line=0, messages=turns)


def _pretrain(module: Any, recipe: Recipe, parts: list[TokenRows], report: Report) -> None:
    model = CausalModel(module=module, base=module, device="cpu", softcap=None)
    module.train()
    optimizer = make_optimizer(model.trainable, WEIGHT_DECAY)
    schedule = LearningRateSchedule(type="cosine", min_lr_ratio=0.05, num_cycles=0.5)
    started_s = time.monotonic()
    batches = _batches(parts, recipe)
    losses = []
    for step in range(recipe.pretrain_steps):
        rows, indices = next(batches)
        (batch,) = micro_batches(rows, indices, tokens_max=2 * STEP_TOKENS, layout="padded", device="cpu")
        loss = Supervised().loss_sum(model, batch) / batch.labelled
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.trainable.values(), 1.0)
        set_learning_rate(
            optimizer, learning_rate_at(step, recipe.pretrain_steps, LEARNING_RATE, WARMUP_RATIO, schedule)
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % REPORT_EVERY_STEPS == 0:
            mean = sum(losses[-REPORT_EVERY_STEPS:]) / REPORT_EVERY_STEPS
            left_s = (time.monotonic() - started_s) / (step + 1) * (recipe.pretrain_steps - step - 1)
            report(f"pre-training step {step + 1}/{recipe.pretrain_steps}, loss {mean:.3f}, {left_s:.0f} s left")


def _batches(parts: list[TokenRows], recipe: Recipe) -> Iterator[tuple[TokenRows, list[int]]]:
    """Endless batches of rows of like length, about STEP_TOKENS each, in an order that the seed decides."""
    epoch = 0
    while True:
        groups = [(rows, group) for rows in parts for group in _groups(rows, recipe.seed, epoch)]
        for position in epoch_order(recipe.seed, epoch, len(groups)).tolist():
            yield groups[position]
        epoch += 1


def _groups(rows: TokenRows, seed: int, epoch: int) -> list[list[int]]:
    shuffled = epoch_order(seed + 1, epoch, rows.count)
    lengths: NDArray[np.int64] = rows.lengths
    by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    groups: list[list[int]] = [[]]
    for row in by_length.tolist():
        if (len(groups[-1]) + 1) * int(lengths[row]) > STEP_TOKENS:
            groups.append([])
        groups[-1].append(row)
    return groups
