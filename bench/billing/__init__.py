"""Benchmarks of billing: events, transfers, holds, and what an event costs when millions are booked."""
