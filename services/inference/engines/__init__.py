"""Engines: one base model in memory that renders prompts, generates tokens and hot-loads LoRA adapters.

The only room of inference that may import torch, transformers and vLLM; none of it is imported before an engine is
opened (`choice.py`). It refuses to know gRPC, tenants, prices and the artifact store.
"""
