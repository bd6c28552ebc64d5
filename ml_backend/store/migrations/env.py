"""Alembic's entry: runs the migrations on the engine that `Database.migrate` hands over."""

from alembic import context

from ml_backend.store.tables import Base

engine = context.config.attributes["engine"]
with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    with context.begin_transaction():
        if not context.is_offline_mode() and connection.dialect.name == "postgresql":
            # Several processes may start together; the second waits and finds nothing to do.
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(9090)")
        context.run_migrations()
    connection.commit()
