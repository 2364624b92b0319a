"""The object store: bytes by key, as streams and as whole files with digests. It knows no tenant and no table."""
