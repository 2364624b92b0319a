"""A job's record: what it is, the table of its lifecycle, its history and its secrets.

It knows neither nodes nor policies, and does not decide when anything happens to a job.
"""
