"""The nodes: who is registered and lives, what each shall do, and whom to ask for the analysis of data.

It decides neither what a job's end means nor who gets devices.
"""
