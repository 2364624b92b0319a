"""The scheduler decides what runs where and when, for training and serving alike.

It runs no workload and reads no file.
"""
