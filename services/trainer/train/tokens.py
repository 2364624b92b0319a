"""Turns rows into token ids with a mark on every token that carries loss: the one path for analysis, quote and training.

It knows no packing, no batches and no torch.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from services.trainer.train.data import Conversation, Instruction, Row, RowErrors
from services.trainer.train.spec import TrainOnInputs
from services.trainer.train.template import ChatTemplate, Span, TemplateRefusal
from services.trainer.train.tokenizer import ModelFolder, without_offset_trimming

# Rows tokenised together: enough for the library's threads, few enough for bounded memory.
CHUNK_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Kept rows, end to end: row i is `ids[offsets[i]:offsets[i + 1]]`, and `labelled` says which tokens carry loss.
    The first token of a row is never predicted, so it is never labelled."""

    ids: NDArray[np.int32]
    labelled: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    rows: int
    truncated_rows: int
    skipped_rows: int
    longest_row_tokens: int

    @property
    def count(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def token_count(self) -> int:
        return int(self.offsets[-1])

    @property
    def labelled_count(self) -> int:
        return int(self.labelled.sum())

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.ids[start:end], self.labelled[start:end]

    def digest(self) -> str:
        digest = hashlib.sha256()
        for array in (self.ids, self.labelled, self.offsets):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


class RowTokenizer:
    """Renders and tokenises rows for one base model. `template` may be None when all rows are instructions."""

    def __init__(self, folder: ModelFolder, template: ChatTemplate | None, train_on_inputs: TrainOnInputs) -> None:
        self._tokenizer = folder.tokenizer
        self._exact_offsets = without_offset_trimming(folder.tokenizer)
        self._template = template
        self._eos_id = folder.eos_id
        # "auto" means: formats that tell a prompt from an answer train on the answer. All formats here do.
        self._train_on_inputs = train_on_inputs is True

    def tokenize(self, rows: Iterable[Row], max_seq_length: int, errors: RowErrors) -> TokenRows:
        """Rows beyond `max_seq_length` tokens lose their end; rows left without a labelled token are skipped."""
        ids: list[NDArray[np.int32]] = []
        labelled: list[NDArray[np.bool_]] = []
        lengths = [0]
        seen = truncated = longest = 0
        for row_ids, row_labelled in self._tokenized(rows, errors):
            seen += 1
            longest = max(longest, len(row_ids))
            truncated += len(row_ids) > max_seq_length
            kept_ids, kept_labelled = row_ids[:max_seq_length], row_labelled[:max_seq_length]
            kept_labelled[:1] = False
            if not kept_labelled.any():
                continue
            ids.append(kept_ids)
            labelled.append(kept_labelled)
            lengths.append(len(kept_ids))
        return TokenRows(
            ids=np.concatenate([np.zeros(0, np.int32), *ids]),
            labelled=np.concatenate([np.zeros(0, np.bool_), *labelled]),
            offsets=np.cumsum(np.array(lengths, np.int64)),
            rows=seen,
            truncated_rows=truncated,
            skipped_rows=seen - len(ids),
            longest_row_tokens=longest,
        )

    def _tokenized(
        self, rows: Iterable[Row], errors: RowErrors
    ) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        iterator = iter(rows)
        while chunk := list(islice(iterator, CHUNK_ROWS)):
            if errors.count:
                # The file is refused already: read on for its other errors, but spend nothing on tokens.
                continue
            if isinstance(chunk[0], Instruction):
                yield from self._instructions([row for row in chunk if isinstance(row, Instruction)])
            else:
                yield from self._conversations([row for row in chunk if isinstance(row, Conversation)], errors)

    def _conversations(
        self, rows: list[Conversation], errors: RowErrors
    ) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        texts: list[str] = []
        spans: list[list[Span]] = []
        assert self._template is not None
        for row in rows:
            try:
                text, row_spans = self._template.trained_spans(row, train_on_inputs=self._train_on_inputs)
            except TemplateRefusal as refusal:
                errors.add(row.line, "$.messages", str(refusal))
                continue
            texts.append(text)
            spans.append(row_spans)
        # The template writes every special token itself, as it does at inference.
        encodings = self._exact_offsets.encode_batch(texts, add_special_tokens=False)
        for encoding, row_spans in zip(encodings, spans, strict=True):
            yield np.array(encoding.ids, np.int32), _marks(encoding, row_spans)

    def _instructions(self, rows: list[Instruction]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        # Prompt and completion are tokenised apart, because at inference the prompt stands alone.
        prompts = self._tokenizer.encode_batch([row.prompt for row in rows], add_special_tokens=True)
        completions = self._tokenizer.encode_batch([row.completion for row in rows], add_special_tokens=False)
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt_ids = _without_end(prompt.ids, self._eos_id)
            answer_ids = [*completion.ids, self._eos_id]
            marks = np.ones(len(prompt_ids) + len(answer_ids), np.bool_)
            marks[: len(prompt_ids)] = self._train_on_inputs
            yield np.array([*prompt_ids, *answer_ids], np.int32), marks


def _without_end(ids: list[int], eos_id: int) -> list[int]:
    """Some tokenizers close every text; a prompt goes on."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == eos_id else ids


def _marks(encoding: Encoding, spans: list[Span]) -> NDArray[np.bool_]:
    """A token is labelled when it begins inside a span: one that the prompt shares is the prompt's."""
    marks = np.zeros(len(encoding.ids), np.bool_)
    if not spans:
        return marks
    starts = np.array([start for start, _ in encoding.offsets], np.int64)
    for start, end in spans:
        marks |= (starts >= start) & (starts < end)
    return marks
