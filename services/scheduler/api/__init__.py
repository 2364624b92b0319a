"""What other services and users call: handlers that check, convert, call and answer, and jobs as they are shown.

No rule is decided here.
"""
