"""gRPC on both sides: the server with its guard, channels to other services, deadlines, retries and streams.

It knows no service and no message.
"""
