"""Events between services: transactional outbox, JetStream connection, idempotent consumer.

It knows no event by name.
"""
