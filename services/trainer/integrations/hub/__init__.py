"""Weights to and from repositories of the Hugging Face hub. It knows no curves and no lease."""
