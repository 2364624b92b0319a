"""Rows rendered by the chat template and tokenised, with a mark on every token that carries loss.

It knows no packing and no torch.
"""
