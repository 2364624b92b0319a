"""What ends a trained answer: the token that the model learns to say last, so that a served answer ends with it, too.

It reads the token rows themselves, the same for every format and template. It knows no file and no engine.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from services.trainer.train.data.tokens.token_rows import TokenRows

# Rows that are looked at, evenly over the file: a template ends all turns alike, or a few ways.
ROWS_LOOKED_AT = 4096
# What ends fewer of them was cut off there, or is a token that somebody wrote into an answer.
SHARE_MIN = 1 / 64


@dataclass(frozen=True, kw_only=True)
class TurnEnds:
    """`ids` are the tokens that end an answer, the most frequent first. `open_share` is the share of answers that end
    with plain text, which no engine can tell from any other."""

    ids: tuple[int, ...]
    open_share: float


def turn_ends(rows: TokenRows, tokenizer: Tokenizer, max_seq_length: int) -> TurnEnds:
    """Of the last answer of each row: its last special token, with nothing but white space behind it. An added token
    that is not special ends an answer where it ends all of them. Rows that may have been cut say nothing."""
    added = tokenizer.get_added_tokens_decoder()
    is_space: dict[int, bool] = {}

    def blank(token_id: int) -> bool:
        if token_id not in is_space:
            is_space[token_id] = not tokenizer.decode([token_id], skip_special_tokens=False).strip()
        return is_space[token_id]

    whole: Counter[int | None] = Counter()
    followed: Counter[int | None] = Counter()
    for index in np.unique(np.linspace(0, rows.count - 1, min(rows.count, ROWS_LOOKED_AT)).astype(np.int64)):
        ids, labelled = rows.row(int(index))
        if len(ids) >= max_seq_length:
            continue
        end = len(labelled) - int(labelled[::-1].argmax())
        at = end - 1
        while at > 0 and labelled[at] and int(ids[at]) not in added and blank(int(ids[at])):
            at -= 1
        last = int(ids[at]) if labelled[at] and int(ids[at]) in added else None
        # Something may follow the last answer: a question, or an end that the template puts behind the whole.
        (whole if end == len(ids) else followed)[last] += 1
    found = whole or followed
    looked_at = sum(found.values())
    ids_found = [
        token_id
        for token_id, count in found.most_common()
        if token_id is not None and (count >= SHARE_MIN * looked_at if added[token_id].special else count == looked_at)
    ]
    return TurnEnds(ids=tuple(ids_found), open_share=found[None] / looked_at if looked_at else 0.0)
