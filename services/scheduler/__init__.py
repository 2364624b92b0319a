"""The scheduler decides what runs where and when, for training and serving alike; it runs no workload and reads no file."""
