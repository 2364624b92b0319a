"""Who wants to hear of what: bells that ring in every scheduler process when one of them commits a change.

A bell carries no data and knows no table; whoever hears it looks for itself.
"""
