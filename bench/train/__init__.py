"""The training engine beside TRL's trainers and beside a plain loop of our own, on the same models,
rows and threads."""
