"""The token ids of a conversation, in which each answer begins with a token of its own.

A server reads a prompt as it ends. Where the text goes on, the last token of the prompt may swallow the first
characters of the answer (two line breaks are one token in many vocabularies), and the model would be trained behind a
prompt that no server reads. Such a conversation is read in pieces. Later answers are then trained behind the pieces,
too. It knows no template.
"""

import itertools
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from services.trainer.train.data.tokens.field_marks import Span
from services.trainer.train.data.tokens.template_refusals import joined_answer

# What stands around the beginning of an answer and decides how the tokenizer cuts there, in characters.
_BEFORE_LENGTH = 32
_BEHIND_LENGTH = 2
_KEPT_MAX = 65_536
# In the vocabularies that put a space before a text, no piece holds one together with anything else.
_LINE_BREAK = "\n"
# A space in the vocabularies of SentencePiece and of byte-level tokenizers.
_SPACES = ("\N{LOWER ONE EIGHTH BLOCK}", "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}")


class AnswerTokens:
    """`tokenizer` has offsets that cover every character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._goes_on: dict[tuple[str, str], bool] = {}
        # A piece would get a space in front that the text has not, unless something stands before it.
        self._before_pieces = _LINE_BREAK if _prepends_space(tokenizer) else ""

    def ids_and_marks(
        self, text: str, encoding: Encoding, spans: Sequence[Span], *, answers: bool
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Ids, and a mark on each token that begins inside of a span. `answers` says that spans begin where prompts
        end; `encoding` is the one of the whole text. Raises TemplateRefusal for an answer that no token begins with."""
        offsets = encoding.offsets
        starts = [start for start, _ in offsets]
        cuts = self._cuts(text, offsets, starts, spans) if answers else []
        if not cuts:
            return np.array(encoding.ids, np.int32), _marks(starts, spans)
        edges = [0, *cuts, len(text)]
        pieces = [text[begin:end] for begin, end in itertools.pairwise(edges)]
        return self._joined(pieces, edges, spans)

    def _joined(
        self, pieces: Sequence[str], edges: Sequence[int], spans: Sequence[Span]
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """The pieces of a text that begin at `edges`, each read for itself."""
        before = self._before_pieces
        read = [pieces[0], *(before + piece for piece in pieces[1:])]
        ids: list[int] = []
        starts: list[int] = []
        for number, encoding in enumerate(self._tokenizer.encode_batch(read, add_special_tokens=False)):
            skipped = len(before) if number else 0
            kept = [
                (token, start)
                for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)
                if start >= skipped
            ]
            if skipped and (not kept or kept[0][1] != skipped):
                raise joined_answer(pieces[number - 1], pieces[number])
            ids += [token for token, _ in kept]
            starts += [start - skipped + edges[number] for _, start in kept]
        return np.array(ids, np.int32), _marks(starts, spans)

    def _cuts(
        self, text: str, offsets: Sequence[tuple[int, int]], starts: Sequence[int], spans: Sequence[Span]
    ) -> list[int]:
        cuts: list[int] = []
        for begin, _ in spans:
            before = bisect_left(starts, begin) - 1
            if before >= 0 and (offsets[before][1] > begin or self._differs(text, begin)):
                cuts.append(begin)
        return cuts

    def _differs(self, text: str, begin: int) -> bool:
        """Whether the tokenizer cuts the end of the prompt in another way because the text goes on."""
        around = text[max(0, begin - _BEFORE_LENGTH) : begin], text[begin : begin + _BEHIND_LENGTH]
        if around not in self._goes_on:
            if len(self._goes_on) >= _KEPT_MAX:
                self._goes_on.clear()
            ended, longer = self._tokenizer.encode_batch_fast([around[0], "".join(around)], add_special_tokens=False)
            self._goes_on[around] = longer.ids[: len(ended.ids)] != ended.ids
        return self._goes_on[around]


def _prepends_space(tokenizer: Tokenizer) -> bool:
    """Whether a text that begins with a letter is read as if a space stood before it."""
    ids = tokenizer.encode("a", add_special_tokens=False).ids
    return bool(ids) and (tokenizer.id_to_token(ids[0]) or "").startswith(_SPACES)


def _marks(starts: Sequence[int], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Of tokens that begin at `starts`, in order: one that the prompt shares is the prompt's."""
    marks = np.zeros(len(starts), np.bool_)
    for begin, end in spans:
        marks[bisect_left(starts, begin) : bisect_left(starts, end)] = True
    return marks
