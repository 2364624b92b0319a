"""The training engine: plain torch on transformers models and peft adapters. It knows nothing of gRPC, NATS, leases or prices."""
