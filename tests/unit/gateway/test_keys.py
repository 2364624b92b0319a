"""Secrets: what a key looks like, and what no key can look like."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.identity import keys


def test_a_secret_carries_256_bits_and_is_recognised():
    secret = keys.new_secret()
    assert secret.startswith("fm_")
    assert 62**keys.RANDOM_CHARS >= 2**256
    assert len(secret) == keys.SECRET_CHARS
    assert keys.is_well_formed(secret)
    assert len(keys.digest(secret)) == 32
    assert secret.startswith(keys.shown_prefix(secret))
    assert len(keys.shown_prefix(secret)) < 10


def test_two_secrets_differ():
    assert len({keys.new_secret() for _ in range(100)}) == 100


@given(st.integers(0, 2**32), st.integers(0, keys.SECRET_CHARS - 1), st.characters())
@settings(deadline=None)
def test_one_wrong_character_is_noticed(seed, position, character):
    secret = keys.new_secret(random.Random(seed).randrange)
    changed = secret[:position] + character + secret[position + 1 :]
    assert keys.is_well_formed(changed) == (changed == secret)


@given(st.text(max_size=80))
@settings(deadline=None)
def test_no_text_breaks_the_check(text):
    assert not keys.is_well_formed(text) or len(text) == keys.SECRET_CHARS
