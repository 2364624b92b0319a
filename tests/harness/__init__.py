"""What tests stand on: real servers, scratch databases, certificates. It knows no service."""
