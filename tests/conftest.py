"""Makes the harness's fixtures known to every test."""

from tests.harness.fixtures import database_url, make_settings, nats_server, postgres, tls_dir

__all__ = ["database_url", "make_settings", "nats_server", "postgres", "tls_dir"]
