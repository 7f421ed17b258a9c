"""Alembic's entry: runs the revisions on the connection that `tracegrad.tracestore.migrate` hands over.

Online only: the connection already stands in the transaction (and under the lock) in which everything happens.
"""

from alembic import context

from tracegrad.tracestore.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
    render_as_batch=True,
    on_version_apply=context.config.attributes.get("on_version_apply"),
)
with context.begin_transaction():
    context.run_migrations()
