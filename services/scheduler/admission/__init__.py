"""Whether a request becomes a job, and what it will cost: its spec, files, models, token counts and secrets.

It never learns where a job runs, and stores nothing of a request that it refuses.
"""
