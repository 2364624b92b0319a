"""Who may spend, as billing said last. It counts no money and knows no model, endpoint or engine."""
