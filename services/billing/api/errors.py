"""Turns what pure modules refuse into typed errors of the mesh. It refuses nothing on its own."""

from collections.abc import Iterator
from contextlib import contextmanager

from chassis.errors import InvalidArgument, invalid
from services.billing.prices.pricing import PriceUnknown, QuantityInvalid
from services.billing.usage.bounds import FactInvalid


@contextmanager
def typed_errors(field_prefix: str = "") -> Iterator[None]:
    """`field_prefix` leads from the request to the fields that the pure modules name, for example `price.`."""
    try:
        yield
    except QuantityInvalid as error:
        raise invalid(f"{field_prefix}{error.field}", error.problem) from error
    except PriceUnknown as error:
        raise InvalidArgument("PRICE_UNKNOWN", str(error)) from error
    except FactInvalid as error:
        raise InvalidArgument("EVENT_INVALID", str(error)) from error
