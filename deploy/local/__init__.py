"""The whole mesh as processes on one machine, without Docker: `python -m deploy.local up`. It imports no service."""
