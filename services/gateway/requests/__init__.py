"""What stays of a request in the database: the audit log's entry, and what its request_id made.

It refuses to know what a request asks for.
"""
