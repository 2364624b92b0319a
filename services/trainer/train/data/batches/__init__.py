"""Rows of tokens laid out as tensors, dealt to the processes of a run. It knows no model and no loss."""
