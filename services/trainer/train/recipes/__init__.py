"""Small real base models made on the spot from text that every machine has. They know no hub."""
