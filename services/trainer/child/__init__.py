"""Processes of the training engine: started, heard line by line, asked to stop, killed.

It knows the form of their events, not what they mean.
"""
