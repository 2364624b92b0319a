"""The handlers of inference's gRPC services: check, convert, call, convert. They decide nothing that a room decides."""
