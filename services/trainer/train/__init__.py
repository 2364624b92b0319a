"""The training engine: plain torch on transformers models and peft adapters.

One process trains one run and reports in events. It knows nothing of gRPC, NATS, leases or prices. docs/engine.md draws
its rooms and the path of a step through them.
"""
