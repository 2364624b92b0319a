"""Services outside of the mesh that a job names: Weights & Biases and the Hugging Face hub, each behind a program.

A program is a process of its own, so that the agent can end it at any moment. It knows nothing of the child.
"""
