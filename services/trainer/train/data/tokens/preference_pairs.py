"""Preferences as token rows: row 2i is the preferred and row 2i + 1 the other answer to one question.

The question stands before each answer, by the same template and the same masks as a conversation. It knows no model and
no loss.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from formats.row_errors import RowErrors
from formats.row_formats import answered
from formats.rows import Conversation, Preference
from services.trainer.train.data.tokens.row_tokenizer import RowTokenizer
from services.trainer.train.data.tokens.token_rows import TokenBlock, TokenRow, token_block


def pair_block(
    tokenizer: RowTokenizer, rows: Iterable[Preference], max_seq_length: int, errors: RowErrors
) -> TokenBlock:
    """Answers beyond `max_seq_length` tokens, the question included, lose their end. A pair is skipped as a whole when
    one of its answers has no token left to learn, when both are the same up to the cut, or when its weight is 0. Counts
    are of pairs."""
    kept: list[TokenRow] = []
    truncated: list[int] = []
    skipped: list[int] = []
    seen = longest = 0
    answers_in_order = [answer for row in rows for answer in answers_of(row)]
    for answers in _pairs(tokenizer.tokenized(answers_in_order, errors)):
        seen += 1
        lengths = [len(answer.ids) for answer in answers]
        longest = max(longest, *lengths)
        if max(lengths) > max_seq_length:
            truncated.append(answers[0].line)
        preferred, other = (answer.cut(max_seq_length) for answer in answers)
        differ = not np.array_equal(preferred.ids, other.ids)
        if differ and preferred.is_trained and other.is_trained:
            kept += [preferred, other]
        else:
            skipped.append(answers[0].line)
    return token_block(kept, rows=seen, truncated=truncated, skipped=skipped, longest_row_tokens=longest)


def answers_of(row: Preference) -> Iterator[Conversation]:
    """Two conversations in which nothing but the answer is learned."""
    outputs = {"preferred_output": row.preferred_output, "non_preferred_output": row.non_preferred_output}
    for key, output in outputs.items():
        yield answered(row.line, row.messages, output, row.tools, row.weight, ("input.messages", key))


def _pairs(answers: Iterable[TokenRow]) -> Iterator[tuple[TokenRow, TokenRow]]:
    """Two rows of one line in succession; of a line with an error there may be just one, and its file is refused."""
    first: TokenRow | None = None
    for answer in answers:
        if first is not None and first.line == answer.line:
            yield first, answer
            first = None
        else:
            first = answer
