"""The trainer: an agent on each GPU node, and the training engine that it starts as child processes."""
