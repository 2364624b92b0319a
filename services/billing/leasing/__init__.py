"""Leases of credit, from which calls are reserved before they begin. It books nothing and knows no price."""
