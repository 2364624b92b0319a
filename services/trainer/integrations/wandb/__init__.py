"""Training curves in Weights & Biases. It knows no hub and no lease."""
