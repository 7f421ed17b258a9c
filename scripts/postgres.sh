# Sourced by .ci/run: a throw-away PostgreSQL from Debian's packages, on a free port of the loopback interface.
# start_postgres exports TRACEGRAD_TEST_POSTGRES; stop_postgres removes the server and its files.
# start_postgres [DATA [LOG [INITDB_ARGUMENT...]]]: folders that initdb makes, for its tables and for its write-ahead log.
start_postgres() {
    local bin
    bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
    PG_DIR=$(mktemp -d /tmp/tracegrad-pg.XXXXXX)
    PG_DATA=${1:-$PG_DIR/data}
    PG_PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    PG_AS=()
    if [ "$(id -u)" = 0 ]; then
        chown postgres "$PG_DIR"
        PG_AS=(runuser -u postgres --)
    fi
    PG_CTL="$bin/pg_ctl"
    (cd "$PG_DIR" && "${PG_AS[@]}" "$bin/initdb" -D "$PG_DATA" --waldir="${2:-$PG_DIR/wal}" \
        -U tracegrad --auth=trust "${@:3}" >"/dev/null")
    revive_postgres
    export TRACEGRAD_TEST_POSTGRES="postgresql+psycopg://tracegrad@127.0.0.1:$PG_PORT/postgres"
}
stop_postgres() {
    [ -n "${PG_DIR:-}" ] || return 0
    (cd "$PG_DIR" && "${PG_AS[@]}" "$PG_CTL" -D "$PG_DATA" -m immediate stop >/dev/null 2>&1) || true
    rm -rf "$PG_DIR"
}
# revive_postgres starts a server that has ended again, on its port and files.
revive_postgres() {
    (cd "$PG_DIR" && "${PG_AS[@]}" "$PG_CTL" -D "$PG_DATA" -l "$PG_DIR/log" -w \
        -o "-c listen_addresses=127.0.0.1 -p $PG_PORT -k $PG_DIR" start >/dev/null)
}
