"""The agent keeps in touch with the scheduler and starts and ends attempts. It knows nothing of how one runs."""
