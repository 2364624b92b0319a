"""From dataset files to the micro-batches of a step. It knows no model, no loss and no optimizer."""
