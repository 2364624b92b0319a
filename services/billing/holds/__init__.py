"""Money held for jobs, from the quote to the settlement. It knows no usage record and no event that reports usage."""
