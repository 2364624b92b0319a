"""Monthly spend caps, credit states and what is announced of both. It moves no money and prices nothing."""
