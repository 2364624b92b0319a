#!/usr/bin/env bash
# Runs when the volume is empty: a role per service and a schema that only this role can enter and that its queries need
# not name, as the local stack makes them.
set -euo pipefail

for role in gateway scheduler billing inference; do
  psql --quiet --no-psqlrc --set ON_ERROR_STOP=1 --set "role=$role" --set "variable=FINEMESH_${role^^}_DATABASE_PASSWORD" \
    --host /var/run/postgresql --username "${POSTGRES_USER:-postgres}" --dbname "$POSTGRES_DB" <<'SQL'
-- From the environment, so that no list of processes shows it.
\getenv password :variable
BEGIN;
CREATE ROLE :"role" LOGIN PASSWORD :'password';
CREATE SCHEMA :"role" AUTHORIZATION :"role";
ALTER ROLE :"role" SET search_path = :"role";
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
COMMIT;
SQL
done
