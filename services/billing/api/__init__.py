"""Billing's gRPC services, for the gateway and the scheduler. They check, convert and answer; money is decided in the
other rooms."""
