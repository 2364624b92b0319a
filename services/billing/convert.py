"""Amounts of money as messages, for the converters of all rooms."""

from google.type import money_pb2

_NANOS_USD_PER_USD = 10**9


def money_to_proto(nanos_usd: int) -> money_pb2.Money:
    """Below zero, both parts are."""
    sign = -1 if nanos_usd < 0 else 1
    units, nanos = divmod(abs(nanos_usd), _NANOS_USD_PER_USD)
    return money_pb2.Money(currency_code="USD", units=sign * units, nanos=sign * nanos)
