"""Creating a journal's directory and database. The one file that imports diskcache, and only for this.

Several processes may find nothing at the same moment: one creates under a lock on the directory, the others find it
done. The database is built in a directory of its own and moved to its place complete, so that a process that dies on
the way leaves nothing that could be taken for a journal.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

from agentflow import layout
from agentflow.errors import JournalError, JournalForeign, JournalIncomplete, JournalReadOnly, UsageError
from agentflow.layout import DIGEST_VERSION, LAYOUT_VERSION
from agentflow.store import DB_NAME, SEQUENCE, connect


def create(path: Path) -> layout.Sibling:
    """Create the journal; of several processes one does it and the others find it done."""
    import fcntl

    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as error:
        raise JournalForeign(f"{path} is a file. Set AGENTFLOW_PATH to a directory.") from error
    except OSError as error:
        raise read_only(path, error) from error
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        sibling = layout.read_sibling(path)
        if sibling is None:
            layout.check_new(path)
            try:
                (path / ".gitignore").write_text("*\n", encoding="ascii")
                store = _build(path)
                layout.write_sibling(path, store, 0)
                os.fsync(descriptor)
            except OSError as error:
                raise read_only(path, error) from error
            sibling = layout.read_sibling(path)
    finally:
        os.close(descriptor)
    if sibling is None:
        raise JournalIncomplete(f"{path}: {layout.SIBLING} vanished while the journal was created.")
    return sibling


def _build(path: Path) -> str:
    """Have diskcache build the database beside its place, then move it there complete. Returns the store id."""
    file = path / DB_NAME
    if file.exists():  # a creator died between the two files; its database holds nothing yet
        con = connect(file, readonly=True)
        try:
            (store,) = con.execute("SELECT value FROM Agentflow WHERE key = 'store'").fetchone()
            (sequence,) = con.execute(SEQUENCE).fetchone()
        finally:
            con.close()
        if sequence != 0:
            raise layout.lost_sibling(path)
        return str(store)
    import shutil

    temporary = path / f"new-{os.getpid()}-{os.urandom(4).hex()}"
    temporary.mkdir(mode=0o700)
    try:
        store = _build_store(temporary)
        os.replace(temporary / DB_NAME, file)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return store


def _build_store(folder: Path) -> str:
    import diskcache

    _set_page_size(folder / DB_NAME)
    # Nothing reads it before it is complete and synced, so that building needs neither log nor syncs.
    settings = {**layout.SETTINGS, "sqlite_journal_mode": "memory", "sqlite_synchronous": 0, "sqlite_auto_vacuum": 0}
    diskcache.Cache(str(folder), disk=record_disk(), **settings).close()
    store = os.urandom(16).hex()
    con = sqlite3.connect(folder / DB_NAME, isolation_level=None)
    try:
        con.executescript(_OWN_SCHEMA)
        con.executemany("INSERT OR REPLACE INTO Settings VALUES (?, ?)", list(layout.SETTINGS.items()))
        about = [("store", store), ("layout", LAYOUT_VERSION), ("digest", DIGEST_VERSION), ("commits", 0)]
        con.executemany("INSERT INTO Agentflow VALUES (?, ?)", about)
        con.execute("COMMIT")
        con.execute("PRAGMA journal_mode = WAL")
    finally:
        con.close()
    descriptor = os.open(folder / DB_NAME, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return store


def _set_page_size(file: Path) -> None:
    """Begin the file that diskcache goes on with: the size of its pages is fixed when the first of them is written."""
    con = sqlite3.connect(file, isolation_level=None)
    try:
        # A commit writes each page that it touches, most of them for a few bytes in an index.
        con.execute("PRAGMA page_size = 2048")
        con.execute("VACUUM")
    finally:
        con.close()


# diskcache's triggers name texts in double quotes, which SQLite builds without DQS refuse, and its index of expiry
# times holds every row; under the same names it takes these for its own.
_OWN_SCHEMA = f"""
PRAGMA synchronous = OFF;
BEGIN;
CREATE TABLE Agentflow (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
DROP INDEX Cache_expire_time;
CREATE INDEX Cache_expire_time ON Cache (expire_time) WHERE expire_time IS NOT NULL;
DROP TRIGGER Settings_count_insert;
CREATE TRIGGER Settings_count_insert AFTER INSERT ON Cache FOR EACH ROW BEGIN
    UPDATE Settings SET value = value + 1 WHERE key = 'count'; END;
DROP TRIGGER Settings_count_delete;
{layout.COUNT_DELETE};
DROP TRIGGER Settings_size_insert;
CREATE TRIGGER Settings_size_insert AFTER INSERT ON Cache FOR EACH ROW WHEN NEW.size <> 0 BEGIN
    UPDATE Settings SET value = value + NEW.size WHERE key = 'size'; END;
DROP TRIGGER Settings_size_update;
CREATE TRIGGER Settings_size_update AFTER UPDATE OF size ON Cache FOR EACH ROW WHEN NEW.size <> OLD.size BEGIN
    UPDATE Settings SET value = value + NEW.size - OLD.size WHERE key = 'size'; END;
DROP TRIGGER Settings_size_delete;
CREATE TRIGGER Settings_size_delete AFTER DELETE ON Cache FOR EACH ROW WHEN OLD.size <> 0 BEGIN
    UPDATE Settings SET value = value - OLD.size WHERE key = 'size'; END;
"""


def record_disk() -> Any:
    """The diskcache Disk class of a journal: text keys, text values in rows, everything else refused.

    Its required argument is stored among diskcache's settings, so that a plain ``diskcache.Cache(directory)``
    fails before it rewrites any of them.
    """
    import diskcache

    class RecordDisk(diskcache.Disk):  # type: ignore[misc]
        def __init__(self, directory: str, *, agentflow_layout: int, **kwargs: Any) -> None:
            layout.check_versions(Path(directory), agentflow_layout, DIGEST_VERSION)
            super().__init__(directory, **kwargs)

        def put(self, key: object) -> tuple[str, bool]:
            if type(key) is not str:
                raise UsageError(f"A journal's keys are text, not {type(key).__name__}.")
            return key, True

        def get(self, key: object, raw: object) -> object:
            if type(key) is not str or not raw:
                raise JournalError("This key was not written by agentflow; it is not decoded.")
            return key

        def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, str]:
            if type(value) is not str or read:
                raise UsageError(f"A journal's values are text, not {type(value).__name__}.")
            return 0, 1, None, value

        def fetch(self, mode: int, filename: object, value: object, read: bool) -> str:
            if mode != 1 or filename is not None or type(value) is not str or read:
                raise JournalError("This row was not written by agentflow; it is not decoded.")
            return value

    return RecordDisk


def read_only(path: Path, error: OSError | None) -> JournalReadOnly:
    reason = f" ({error.strerror})" if error is not None and error.strerror else ""
    return JournalReadOnly(
        f"{path}: the journal cannot be written here{reason}. Set AGENTFLOW_PATH to a directory that can be."
    )
