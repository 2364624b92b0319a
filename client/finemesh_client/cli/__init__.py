"""The `finemesh` command: people and scripts drive the mesh with it. It stands on the client alone."""
