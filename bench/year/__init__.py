"""A year of events in some minutes: real outbox, relay, bus, ledger and archive by a clock that is set forward."""
