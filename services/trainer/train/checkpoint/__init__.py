"""Checkpoints: what is in one, how it is written and how a run goes on from it. It knows no schedule and no event."""
