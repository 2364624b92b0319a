"""The trainer: an agent on each GPU node, and the training engine (`train`), which it starts as processes.

No room of the agent imports torch.
"""
