"""The life of an attempt at a job: its lease, its reports and its end, each step fenced by the lease's token.

It knows neither what a node computes nor who chose the node.
"""
