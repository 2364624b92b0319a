"""What the organization pays: credit, caps, costs, invoices and the ledger. It decides no amount."""
