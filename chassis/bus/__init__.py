"""Events between services: transactional outbox, JetStream connection, idempotent consumer.

It knows no event by name.
"""

# As what a server answers for the streams when its health is asked: do they have room?
STREAMS_HEALTH = "finemesh.bus.streams"
