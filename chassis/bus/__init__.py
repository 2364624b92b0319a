"""Events between services: transactional outbox, JetStream connection, idempotent consumer.

It knows no event by name.
"""

# As what a server answers for the streams when its health is asked: do they have room?
STREAMS_HEALTH = "finemesh.bus.streams"
# And: does the bus take events? A server that does not although its disk has room has to be started again.
PUBLISHING_HEALTH = "finemesh.bus.publishing"
