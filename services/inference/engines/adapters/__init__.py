"""LoRA adapters inside an engine: checks of their files, which are in memory, and their arithmetic on a CPU.

It refuses to know which library computes the base model, and where adapters come from.
"""
