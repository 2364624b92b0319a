"""Price books and what work costs by them. It knows no customer, no balance and no event."""
