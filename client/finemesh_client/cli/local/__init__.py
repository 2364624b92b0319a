"""The mesh on this machine: starts it, and shows all of it in one demo. It imports no service."""
