"""What a daemon says of itself: traces, logs and their export. It knows no transport and no product noun."""
