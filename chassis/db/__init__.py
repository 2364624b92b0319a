"""Everything a daemon needs to stand on PostgreSQL: pool, named queries, migrations. It knows no table of a service."""
