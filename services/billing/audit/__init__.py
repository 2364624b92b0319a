"""The ledger recomputed from its rows, and the first difference. It changes nothing and believes no row."""
