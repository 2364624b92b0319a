"""The model: loading, adapters, kernels, sharding, its trained weights as files, and its optimizer.

It knows no loss and no step.
"""
