"""The model: loading, adapters, kernels, sharding over devices, its trained weights as files, and the optimizer of its
weights.

It knows no loss and no step.
"""
