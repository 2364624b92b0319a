"""A whole mesh under a steady crowd, for minutes or days: what grows, what is lost, how late answers come."""
