"""The formats of dataset files, read as typed rows with an error for everything that is wrong. It knows no
tokenizer."""
