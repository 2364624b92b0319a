"""Events that money follows from, kept in the object store before they leave the bus. It books nothing."""
