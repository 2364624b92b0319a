"""Who wants to hear of what: every scheduler process is notified when one of them commits a change.

A notification carries a topic and no data; whoever hears it looks for itself.
"""
