#!/usr/bin/env bash
# Runs a command with a throw-away PostgreSQL, where one is installed and TRACEGRAD_TEST_POSTGRES names none.
# Called by `make bench-store` and `make test-long`.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${TRACEGRAD_TEST_POSTGRES:-}" ] && ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1; then
    source scripts/postgres.sh
    start_postgres
    trap stop_postgres EXIT
fi
"$@"
