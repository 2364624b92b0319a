"""The gRPC handlers of the gateway, and the proxy to the other services. They decide nothing that a room decides."""
