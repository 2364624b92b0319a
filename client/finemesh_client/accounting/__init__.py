"""An exported journal, recomputed and rendered without the service that wrote it. It asks nobody."""
