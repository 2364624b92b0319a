"""A small good price book, and every mistake in it that a reader must refuse, with the line that it must name."""

from dataclasses import dataclass

GOOD = """\
book: test
version: test-1
effective_from: 2026-01-01
currency: USD
tuning:
  terms:
    - {description: Training, tokens: training_tokens, times: [epochs]}
  base_fee_usd: 0
  minimum_usd: 5.00
  rates:
    - {model: a/one, usd_per_million_tokens: {sft_lora: 1.00}}
    - {model: a/*, usd_per_million_tokens: {sft_lora: 2.00}}
    - {model: a/b-*, usd_per_million_tokens: {sft_lora: 3.00}}
    - {billions: [0, 16], usd_per_million_tokens: {sft_lora: 4.00}}
inference:
  - {model: "*", input_usd_per_million_tokens: 0.1, output_usd_per_million_tokens: 0.0375}
hosting:
  - {hardware_type: cpu, usd_per_device_hour: 0.06}
clusters:
  - {hardware_type: h100-*, usd_per_node_hour: 26.88}
"""

# Every section and every optional key once.
GOOD_IN_FULL = """\
book: test
version: test-2
effective_from: 2026-01-01
effective_until: 2027-01-01
currency: USD
tuning:
  terms:
    - {description: Training, tokens: training_tokens, times: [epochs]}
    - {description: Validation, tokens: validation_tokens, times: [epochs, evaluations]}
  base_fee: {usd: 0.25, applies_to: [completed, user_failure]}
  minimum: {usd: "5.00", applies_to: [completed]}
  model_billions: {a/one: 1}
  rates:
    - {model: a/one, usd_per_million_tokens: {sft_lora: 1.00, sft_full: 2, dpo_lora: 3, dpo_full: 4}}
    - {billions: [2, 16], usd_per_million_tokens: {sft_lora: 4.00}}
inference:
  - {model: a/one, input_usd_per_million_tokens: 0.1, output_usd_per_million_tokens: 0.2}
  - {billions: [2, 16], input_usd_per_million_tokens: 0.1, output_usd_per_million_tokens: 0.2}
hosting:
  - {hardware_type: cpu, usd_per_device_hour: 0.06}
clusters:
  - {hardware_type: cpu, usd_per_node_hour: 0.48}
"""


@dataclass(frozen=True, kw_only=True)
class WrongBook:
    """`structural`: a schema can see it as well; the others are about two values at once,
    or about how YAML is written."""

    text: str
    line: int
    problem: str
    structural: bool = True


def _wrong(old: str, new: str, line: int, problem: str, *, structural: bool = True) -> WrongBook:
    assert GOOD.count(old) >= 1, old
    return WrongBook(text=GOOD.replace(old, new, 1), line=line, problem=problem, structural=structural)


def _fixed(new: str, line: int, problem: str) -> WrongBook:
    return _wrong("minimum_usd: 5.00", f"minimum: {new}", line, problem)


WRONG = (
    # Amounts.
    _wrong("minimum_usd: 5.00", "minimum_usd: -5.00", 9, "not negative"),
    _wrong("minimum_usd: 5.00", "minimum_usd: 0.0000000001", 9, "nine decimals", structural=False),
    _wrong("minimum_usd: 5.00", 'minimum_usd: "0.0000000001"', 9, "at most nine decimals"),
    _wrong("minimum_usd: 5.00", "minimum_usd: lots", 9, "lots"),
    _wrong("minimum_usd: 5.00", "minimum_usd: .nan", 9, "nan", structural=False),
    _wrong("minimum_usd: 5.00", "minimum_usd: 0x10", 9, "0x10", structural=False),
    _wrong("minimum_usd: 5.00", "minimum_usd: 010", 9, "010", structural=False),
    _wrong("minimum_usd: 5.00", "minimum_usd: true", 9, "yes or no"),
    _wrong("minimum_usd: 5.00", "minimum_usd: 99999999", 9, "at most 1000000"),
    _wrong("minimum_usd: 5.00", "minimum_usd:", 9, "a value is expected"),
    _wrong("minimum_usd: 5.00", "minimum_usd: [5.00]", 9, "a value is expected"),
    _wrong("sft_lora: 1.00", "sft_lora: -1.00", 11, "not negative"),
    _wrong("input_usd_per_million_tokens: 0.1", "input_usd_per_million_tokens: -0.1", 16, "not negative"),
    _wrong("usd_per_device_hour: 0.06", "usd_per_device_hour: -0.06", 18, "not negative"),
    _wrong("usd_per_node_hour: 26.88", "usd_per_node_hour: -26.88", 20, "not negative"),
    # Base fee and minimum with what they apply to.
    _fixed("{usd: -5.00, applies_to: [completed]}", 9, "not negative"),
    _fixed("{usd: 5.00, applies_to: [refused]}", 9, "'refused' is not one of completed"),
    _fixed("{usd: 5.00, applies_to: [completed, completed]}", 9, "given twice"),
    _fixed("{usd: 5.00, applies_to: completed}", 9, "a list is expected"),
    _fixed("{usd: 5.00}", 9, "'applies_to' is missing"),
    _fixed("5.00", 9, "a mapping is expected"),
    _wrong("minimum_usd: 5.00", "minimum_usd: 5\n  minimum: {usd: 5, applies_to: []}", 6, "exactly one of 'minimum'"),
    _wrong("  base_fee_usd: 0\n", "", 6, "exactly one of 'base_fee'"),
    # Ambiguous and overlapping entries.
    _wrong("a/b-*", "a/*", 13, "a/* overlaps a/* of line 12", structural=False),
    _wrong("model: a/b-*", "billions: [16, 20]", 14, "of line 13 for sft_lora", structural=False),
    _wrong(
        "hosting:",
        "hosting:\n  - {hardware_type: cpu, usd_per_device_hour: 1}",
        19,
        "cpu overlaps cpu of line 18",
        structural=False,
    ),
    _wrong(
        "clusters:", "clusters:\n  - {hardware_type: h100-*, usd_per_node_hour: 1}", 21, "of line 20", structural=False
    ),
    _wrong(
        "inference:",
        'inference:\n  - {model: "*", input_usd_per_million_tokens: 1, output_usd_per_million_tokens: 1}',
        17,
        "of line 16",
        structural=False,
    ),
    _wrong("[0, 16]", "[16, 0]", 14, "a range", structural=False),
    _wrong("[0, 16]", "[16]", 14, "[first, last]"),
    _wrong("[0, 16]", "[0, 8, 16]", 14, "first, last"),
    _wrong("[0, 16]", "[0.5, 16]", 14, "whole number"),
    _wrong("[0, 16]", "[-1, 16]", 14, "up to 100000: '-1'"),
    _wrong("[0, 16]", "[0, 100001]", 14, "up to 100000: '100001'"),
    # What a rate is for.
    _wrong("model: a/one, ", "", 11, "exactly one of 'model' and 'billions'"),
    _wrong("model: a/one", "model: a/one, billions: [1, 2]", 11, "exactly one of"),
    _wrong("model: a/one", "model: 'a one'", 11, "no id"),
    _wrong("model: a/one", "model: 1234", 11, "a whole number to YAML, so it belongs in quotes"),
    _wrong("model: a/b-*", "model: a/*-b*", 13, "no pattern"),
    _wrong("hardware_type: cpu", "hardware_type: ''", 18, "value is expected"),
    _wrong("{sft_lora: 1.00}", "{sft_magic: 1.00}", 11, "sft_magic"),
    _wrong("{sft_lora: 1.00}", "{}", 11, "at least one of sft_lora"),
    # The rule.
    _wrong("[epochs]", "[epochs, epochs]", 7, "multiplied twice"),
    _wrong("[epochs]", "[evaluations]", 7, "not one of"),
    _wrong("tokens: training_tokens", "tokens: all_tokens", 7, "all_tokens"),
    _wrong(
        "  base_fee_usd",
        "    - {description: Again, tokens: training_tokens, times: []}\n  base_fee_usd",
        8,
        "two terms",
    ),
    _wrong(
        "    - {description: Training, tokens: training_tokens, times: [epochs]}\n", "    []\n", 7, "at least one term"
    ),
    _wrong("description: Training", 'description: ""', 7, "a value is"),
    # Names, dates and keys.
    _wrong("currency: USD", "currency: EUR", 4, "EUR"),
    _wrong("currency: USD", "currency: USD\ncurrency: USD", 5, "given twice, first in line 4", structural=False),
    _wrong("currency: USD", "currency: USD\ncolour: red", 5, "not known"),
    _wrong("version: test-1", "version: 2026", 2, "in quotes"),
    _wrong("version: test-1", "version: test 1", 2, "'test 1' is no id"),
    _wrong("effective_from: 2026-01-01", "effective_from: soon", 3, "'soon' is no date"),
    _wrong("effective_from: 2026-01-01", "effective_from: 2026-02-30", 3, "2026-02-30"),
    _wrong("effective_from: 2026-01-01", "effective_from: 20260101", 3, "'20260101' is no date"),
    _wrong("currency: USD", "currency: USD\neffective_until: 2025-01-01", 5, "end after it begins", structural=False),
    _wrong("currency: USD\n", "", 1, "'currency' is missing"),
    _wrong("hardware_type: cpu", "hardware_type: cpu, usd_per_minute: 1", 18, "usd_per_minute"),
    # YAML itself.
    _wrong("[epochs]}", "[epochs]", 8, "expected", structural=False),
    WrongBook(text="- a list\n", line=1, problem="mapping is expected"),
    WrongBook(text="", line=1, problem="empty"),
    WrongBook(text=GOOD + "---\n" + GOOD, line=21, problem="another document", structural=False),
)
