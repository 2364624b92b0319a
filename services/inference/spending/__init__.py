"""Who may spend, by leases of credit and by what billing said last. It knows no model, endpoint or engine."""
