"""Turns rows into token ids with a mark on every token that carries loss.

Analysis, preview, quote and training share this one path. It knows no file, no packing, no batches and no torch.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from tokenizers import Encoding, Tokenizer

from formats.prompts.model_folder import ModelFolder
from formats.row_errors import RowErrors
from formats.rows import Conversation, Feedback, Instruction, Preference, Row, Text, Tokens
from services.trainer.train.data.tokens.answer_tokens import AnswerTokens
from services.trainer.train.data.tokens.base_tokenizer import eos_id_of, no_template, without_offset_trimming
from services.trainer.train.data.tokens.field_marks import Span
from services.trainer.train.data.tokens.template import ChatTemplate
from services.trainer.train.data.tokens.template_refusals import TOOLS, TemplateRefusal
from services.trainer.train.data.tokens.token_rows import KeptRows, TokenBlock, TokenRow, TokenRows, token_block
from services.trainer.train.settings.failures import Failure, Violation, user_failure
from services.trainer.train.settings.spec import TrainOnInputs

# Texts are encoded together up to these; an encoding holds a hundred bytes and more for each of its tokens.
ENCODED_TEXTS_MAX = 1024
ENCODED_CHARACTERS_MAX = 1024**2


class RowTokenizer:
    """Renders and tokenises rows for one base model. `template` may be None when no row is a conversation."""

    def __init__(self, folder: ModelFolder, template: ChatTemplate | None, train_on_inputs: TrainOnInputs) -> None:
        self._tokenizer = folder.tokenizer
        self._exact_offsets = without_offset_trimming(folder.tokenizer)
        self._answers = AnswerTokens(self._exact_offsets)
        self._template = template
        self._opening_ids = folder.opening_ids
        self._eos_id = eos_id_of(folder)
        self._vocabulary_size = folder.vocabulary_size
        # Such as Gemma 3's token for images, in its models of text.
        self._has_tokens_without_row = folder.tokenizer.get_vocab_size() > folder.vocabulary_size
        # "auto" means: formats that tell a prompt from an answer train on the answer, the others on everything.
        self._train_on_inputs = train_on_inputs is True
        self._inputs_must_not_train = train_on_inputs is False

    def tokenize(self, rows: Iterable[Row], max_seq_length: int, errors: RowErrors) -> TokenRows:
        """The token rows of rows that are all there is."""
        kept = KeptRows(None)
        kept.append(self.block(list(rows), max_seq_length, errors))
        return kept.token_rows()

    def block(self, rows: Sequence[Row], max_seq_length: int, errors: RowErrors) -> TokenBlock:
        """Rows beyond `max_seq_length` tokens lose their end; rows left without a labelled token, and rows of weight 0,
        are skipped."""
        kept: list[TokenRow] = []
        truncated: list[int] = []
        skipped: list[int] = []
        seen = longest = 0
        for row in self.tokenized(rows, errors):
            seen += 1
            longest = max(longest, len(row.ids))
            if len(row.ids) > max_seq_length:
                truncated.append(row.line)
            cut = row.cut(max_seq_length)
            if cut.is_trained:
                kept.append(cut)
            else:
                skipped.append(row.line)
        return token_block(kept, rows=seen, truncated=truncated, skipped=skipped, longest_row_tokens=longest)

    def tokenized(self, rows: Sequence[Row], errors: RowErrors) -> Iterator[TokenRow]:
        """Whole rows of one format, in their order; what a template refuses becomes an error, as does a token that the
        model has no weights for."""
        if not rows:
            return
        for row in self._of_one_format(rows, errors):
            if self._has_tokens_without_row and row.ids.max(initial=0) >= self._vocabulary_size:
                token = self._tokenizer.id_to_token(int(row.ids.max()))
                errors.add(row.line, "$", f"no text with {token!r}, a token that the base model has no weights for")
                continue
            yield row

    def _of_one_format(self, rows: Sequence[Row], errors: RowErrors) -> Iterator[TokenRow]:
        match rows[0]:
            case Conversation():
                yield from self._conversations([row for row in rows if isinstance(row, Conversation)], errors)
            case Instruction():
                yield from self._instructions([row for row in rows if isinstance(row, Instruction)])
            case Text():
                yield from self._texts([row for row in rows if isinstance(row, Text)])
            case Tokens():
                yield from self._tokens([row for row in rows if isinstance(row, Tokens)], errors)
            case Feedback():
                yield from self._judged([row for row in rows if isinstance(row, Feedback)], errors)
            case Preference():
                raise TypeError("preferences are tokenised as pairs of conversations, by preference_pairs.py")

    def _conversations(self, rows: list[Conversation], errors: RowErrors) -> Iterator[TokenRow]:
        rendered: list[tuple[Conversation, str, list[Span]]] = []
        if self._template is None:
            raise no_template()
        error: tuple[int, str, str] | None = None
        for row in rows:
            try:
                text, spans = self._template.trained_spans(row, train_on_inputs=self._train_on_inputs)
            except TemplateRefusal as refusal:
                error, before = (row.line, _path(row, refusal.part), str(refusal)), error
                if error != before:
                    # An error in a question is found with both of its answers and is reported once.
                    errors.add(*error)
                continue
            rendered.append((row, text, spans))
        # The template writes every special token itself, as it does at inference.
        texts = [text for _, text, _ in rendered]
        encodings = _encoded(self._exact_offsets, texts, offsets=True)
        answers = not self._train_on_inputs
        for encoding, (row, text, spans) in zip(encodings, rendered, strict=True):
            try:
                ids, marks = self._answers.ids_and_marks(text, encoding, spans, answers=answers)
            except TemplateRefusal as refusal:
                errors.add(row.line, _path(row, refusal.part), str(refusal))
                continue
            yield TokenRow(line=row.line, ids=ids, labelled=marks, weight=row.weight)

    def _instructions(self, rows: list[Instruction]) -> Iterator[TokenRow]:
        # Prompt and completion are tokenised apart, because at inference the prompt stands alone.
        prompts = _encoded(self._tokenizer, [row.prompt for row in rows])
        completions = _encoded(self._tokenizer, [row.completion for row in rows])
        for row, prompt, completion in zip(rows, prompts, completions, strict=True):
            prompt_ids = [*self._opening_ids, *prompt.ids]
            answer_ids = [*completion.ids, self._eos_id]
            marks = np.ones(len(prompt_ids) + len(answer_ids), np.bool_)
            marks[: len(prompt_ids)] = self._train_on_inputs
            ids = np.array([*prompt_ids, *answer_ids], np.int32)
            yield TokenRow(line=row.line, ids=ids, labelled=marks, weight=row.weight)

    def _judged(self, rows: list[Feedback], errors: RowErrors) -> Iterator[TokenRow]:
        """An answer with thumbs down has a negative weight. In one file some answers may be messages, others text."""
        for _, alike in itertools.groupby(rows, key=lambda row: type(row.example)):
            judged = {row.line: row for row in alike}
            for token_row in self.tokenized([row.example for row in judged.values()], errors):
                label = judged[token_row.line].label
                yield token_row if label else replace(token_row, weight=-token_row.weight)

    def _texts(self, rows: list[Text]) -> Iterator[TokenRow]:
        """A text is all answer: it has no input that could be left out."""
        if self._inputs_must_not_train:
            raise _no_inputs("rows of text")
        encodings = _encoded(self._tokenizer, [row.text for row in rows])
        for row, encoding in zip(rows, encodings, strict=True):
            ids = np.array([*self._opening_ids, *encoding.ids, self._eos_id], np.int32)
            yield TokenRow(line=row.line, ids=ids, labelled=np.ones(len(ids), np.bool_), weight=row.weight)

    def _tokens(self, rows: list[Tokens], errors: RowErrors) -> Iterator[TokenRow]:
        """Takes ids as they came. Labels of the file hold, unless everything is to be trained."""
        for row in rows:
            ids = row.ids
            if ids.max() >= self._vocabulary_size:
                expected = f"ids from 0 to {self._vocabulary_size - 1}, the vocabulary of the base model"
                errors.add(row.line, f"$.input_ids[{int(ids.argmax())}]", expected)
                continue
            if row.labelled is None and self._inputs_must_not_train:
                raise _no_inputs("token rows without labels")
            everything = row.labelled is None or self._train_on_inputs
            marks = np.ones(len(ids), np.bool_) if everything else np.array(row.labelled, np.bool_)
            yield TokenRow(line=row.line, ids=ids, labelled=marks, weight=row.weight)


def _path(row: Conversation, part: int | str | None) -> str:
    """Where a part of the conversation stands in its line, as a JSON path."""
    if part == TOOLS:
        # Beside the messages of the question.
        return f"$.{''.join(row.question.rpartition('.')[:2])}tools"
    if not isinstance(part, int):
        return f"$.{row.answer or row.question}"
    if not row.answer or part < row.asked:
        return f"$.{row.question}[{part}]"
    return f"$.{row.answer}[{part - row.asked}]"


def _no_inputs(what: str) -> Failure:
    rule = f"must be auto or true: {what} do not tell inputs from outputs"
    return user_failure(
        "INVALID_FIELD", f"train_on_inputs {rule}", [Violation(field="train_on_inputs", description=rule)]
    )


def _encoded(tokenizer: Tokenizer, texts: list[str], *, offsets: bool = False) -> Iterator[Encoding]:
    """Encodings in the order of the texts, some at a time, of the texts alone: what the tokenizer would put before or
    behind them is not there. Without offsets the ids are the same and come faster."""
    encode = tokenizer.encode_batch if offsets else tokenizer.encode_batch_fast
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == ENCODED_TEXTS_MAX or characters >= ENCODED_CHARACTERS_MAX:
            yield from encode(batch, add_special_tokens=False)
            batch, characters = [], 0
    if batch:
        yield from encode(batch, add_special_tokens=False)
