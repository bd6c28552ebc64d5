"""Opens the database (SQLite in a file, or PostgreSQL by URL) and migrates its schema at start."""

from __future__ import annotations

import json
import logging
import math
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from filelock import FileLock
from sqlalchemy import Engine, UpdateBase, create_engine, event, inspect
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry

from ml_backend.store.tables import Base

_Row = TypeVar("_Row")
_MIGRATIONS = Path(__file__).parent / "migrations"
# Alembic keeps what it works on in a global of the process.
_alembic = Lock()
_LOG_PAGES = 16_384
"""Pages of SQLite's log, of 4 KiB, after which a commit writes them into the file itself."""
_WAIT = 10.0
"""Seconds that a write waits for others before it fails: a thread that waits serves no request."""
QUEUE_SCHEMA = "dbos"
"""PostgreSQL's schema of the tables of the queue's engine."""
_COPIES = 3
"""Copies of a SQLite file that are kept, each as it was before a change of its schema."""


class SchemaError(RuntimeError):
    """The schema cannot be brought to this release's; the text says why, and what helps."""


class Database:
    """Sessions on one database.

    Args:
        url: SQLAlchemy URL, `sqlite:///file` or `postgresql+psycopg://…`.
        read_only: whether the database itself refuses to write for these sessions.
    """

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        self.url = url
        self.read_only = read_only
        self.engine = _engine(url, self._opened, read_only)
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)
        reading = self.engine.execution_options(reading=True)
        self._readings = sessionmaker(reading, expire_on_commit=False)
        self._single = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        # SQLite lets writers poll for its one lock, and some then wait for seconds under a burst:
        # the threads of one process take turns instead.
        self._lock = Lock()
        self._file: tuple[int, int] | None = None

    @property
    def is_sqlite(self) -> bool:
        """Tells whether the database is a SQLite file."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Opens a transaction: committed at the end, rolled back on an exception.

        Raises:
            OperationalError: it cannot begin; nothing was written.
        """
        with self._turn(), self._sessions.begin() as session:
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Opens a transaction that only reads, and so waits for no writer."""
        with self._readings.begin() as session:
            yield session

    def change(self, statement: UpdateBase) -> int:
        """Executes one statement that is a transaction by itself; answers the rows it changed.

        SQLite's one lock is held while it runs, and not for a moment more: a process of the lowest
        priority that has to wait for its turn between a `BEGIN` and its `COMMIT` holds up every
        other for half a second.
        """
        with self._turn(), self._single.connect() as connection:
            return connection.execute(statement).rowcount

    def insert(self, table: type[Base]) -> Any:
        """Makes an `INSERT` that knows `ON CONFLICT`, in this database's dialect.

        Rows are given when it is executed: as its values, they would be compiled anew each time,
        a hundred of them for a third of a second under load, while others wait to write.
        """
        return (sqlite_insert if self.is_sqlite else postgresql_insert)(
            Base.metadata.tables[table.__tablename__]
        )

    def migrate(self) -> None:
        """Brings the schema to this release's; safe when several processes start together.

        A SQLite file of an older schema is copied beside itself first, as `….schema-` and the
        number of that schema. In one transaction: killed, it has not begun.

        Raises:
            SchemaError: a newer release wrote it, or it could not be copied.
            OSError: no file can be written there.
        """
        # Before its import: that alone makes it talk of its plugins.
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from alembic import command
        from alembic.config import Config
        from alembic.script import ScriptDirectory

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        config.attributes["engine"] = self.engine
        known = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
        if self.is_sqlite and self.engine.url.database:
            file = Path(self.engine.url.database)
            file.parent.mkdir(parents=True, exist_ok=True)
            with _alembic, FileLock(f"{file}.migrating"):
                before = self._schema(known)
                if before is not None and before != known[0]:
                    _copy(file, before)
                command.upgrade(config, "head")
                self._create_queue()
            # Tokens that `/setup` brought lie in it: no one else may read it.
            file.chmod(0o600)
        else:
            with _alembic:
                self._schema(known)
                command.upgrade(config, "head")
                self._create_queue()

    def _create_queue(self) -> None:
        """Creates the tables of the queue's engine where there are none; workers keep them up to
        date."""
        with self.engine.execution_options(reading=True).connect() as connection:
            schema = None if self.is_sqlite else QUEUE_SCHEMA
            if inspect(connection).has_table("workflow_status", schema=schema):
                return
        from dbos import DBOS

        logging.getLogger("dbos").setLevel(logging.ERROR)
        DBOS.migrate(self.url, schema=QUEUE_SCHEMA)

    def checkpoint(self) -> None:
        """Writes SQLite's log into its file, so that no commit has to: it waits for the disk."""
        if self.is_sqlite:
            with self._single.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")

    def close(self) -> None:
        """Closes the connections."""
        self.engine.dispose()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Held while something is written to SQLite."""
        if not self.is_sqlite:
            yield
            return
        if not self._lock.acquire(timeout=_WAIT):
            raise _refused(f"it was locked for {_WAIT:g} s")
        try:
            self._check_file()
            yield
        finally:
            self._lock.release()

    def _check_file(self) -> None:
        """What is written to a file that was deleted would be acknowledged, and lost."""
        if self._file is None or self._file == self._on_disk():
            return
        self.engine.dispose()
        self._file = None
        raise _refused(
            f"{self.engine.url.database} was removed or replaced: put it back, or restart"
        )

    def _opened(self) -> None:
        self._file = self._on_disk()

    def _on_disk(self) -> tuple[int, int] | None:
        try:
            status = Path(self.engine.url.database or "").stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _schema(self, known: list[str]) -> str | None:
        """Reads the revision of the schema, one of those known; None for an empty database."""
        from alembic.migration import MigrationContext

        with self.engine.execution_options(reading=True).connect() as connection:
            revision = MigrationContext.configure(connection).get_current_revision()
        if revision is not None and revision not in known:
            raise SchemaError(
                f"its schema is {revision}, and this release knows those up to {known[0]}: "
                "install the release that wrote it, or restore a copy from before"
            )
        return revision


def is_outside(error: BaseException | None) -> bool:
    """Tells whether an error comes from the state of the database (away, locked, full, damaged) and
    not from a fault of this program."""
    return isinstance(error, OperationalError | sqlite3.OperationalError) or type(error) in (
        # What SQLite raises of a damaged file.
        DatabaseError,
        sqlite3.DatabaseError,
    )


def _refused(why: str) -> OperationalError:
    return OperationalError(None, None, sqlite3.OperationalError(why))


def in_chunks(rows: Iterable[_Row], size: int = 500) -> Iterator[list[_Row]]:
    """Splits rows into lists of at most `size`: databases limit the parameters of a statement."""
    chunk: list[_Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _copy(file: Path, schema: str) -> None:
    """Copies a SQLite file, whole or not at all, and deletes the oldest copies."""
    try:
        # Only its owner may read a temporary file, and a copy must not be seen half written.
        descriptor, name = tempfile.mkstemp(prefix=f"{file.name}.copying-", dir=file.parent)
        os.close(descriptor)
        copy = Path(name)
        try:
            with closing(sqlite3.connect(file)) as old, closing(sqlite3.connect(copy)) as new:
                # What still lies in its write-ahead log is copied as well.
                old.backup(new)
            copy.replace(file.with_name(f"{file.name}.schema-{schema}"))
        except BaseException:
            copy.unlink()
            raise
    except (OSError, sqlite3.Error) as error:
        raise SchemaError(
            f"its schema is older, and it could not be copied before it is changed: {error}; make "
            "room beside it"
        ) from error
    for old_copy in sorted(file.parent.glob(f"{file.name}.schema-*"))[:-_COPIES]:
        with suppress(OSError):
            old_copy.unlink()


def _engine(url: str, opened: Callable[[], None], read_only: bool) -> Engine:
    if not url.startswith("sqlite"):
        engine = create_engine(url, pool_pre_ping=True, hide_parameters=True, json_serializer=_json)

        @event.listens_for(engine, "connect")
        def _in_utc(connection: Any, _: ConnectionPoolEntry) -> None:
            # Moments come back in the session's time zone: otherwise that of the server.
            connection.execute("SET TIME ZONE 'UTC'")
            if read_only:
                connection.execute("SET default_transaction_read_only = on")
            connection.commit()

        return engine
    engine = create_engine(
        url, connect_args={"timeout": _WAIT}, hide_parameters=True, json_serializer=_json
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _: ConnectionPoolEntry) -> None:
        # Readers never wait for the writer (WAL); a writer waits for another instead of failing.
        # NORMAL keeps every commit through a crash of the process; see SQLite's PRAGMA docs.
        connection.isolation_level = None
        for pragma in (
            "journal_mode=WAL",
            "synchronous=NORMAL",
            "foreign_keys=ON",
            # Where no worker does it (`checkpoint`).
            f"wal_autocheckpoint={_LOG_PAGES}",
        ):
            connection.execute(f"PRAGMA {pragma}")
        if read_only:
            connection.execute("PRAGMA query_only=ON")
        opened()

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        options = connection.get_execution_options()
        if options.get("isolation_level") == "AUTOCOMMIT":
            return
        # IMMEDIATE takes the write lock at once: what is read cannot go stale before it is written.
        connection.exec_driver_sql("BEGIN" if options.get("reading") else "BEGIN IMMEDIATE")

    return engine


def _json(value: Any) -> str:
    """Writes JSON that every database takes: NaN and infinity, which PostgreSQL refuses, become
    null."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
