"""Looking after a journal: whether all is there, how large it is, whole copies, and copies of some runs.

``verify`` and ``stats`` open the files for reading only and change nothing, also where ``Journal.open`` refuses.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from agentflow import children, layout, rundocs
from agentflow.errors import JournalError, JournalIncomplete, RunBusy, UsageError
from agentflow.index import Row
from agentflow.journal import Add, Journal, Op, Place, PostgresURL
from agentflow.lease import acquire
from agentflow.purge import keys_of
from agentflow.rowcheck import FileTable, JournalTable, Problem, Rows
from agentflow.store import DB_NAME, SEQUENCE, connect, translate

_CHUNK = 2000


@dataclass(frozen=True, slots=True)
class Verified:
    """What ``verify`` has found; true when nothing is missing, damaged or foreign."""

    path: Place
    rows: int
    problems: list[Problem]

    def __bool__(self) -> bool:
        return all(problem.kind == "leftover" for problem in self.problems)


def verify(place: Place, *, rows: bool = True) -> Verified:
    """Look whether a journal is complete and readable. Nothing is changed.

    Args:
        place: its directory, or the URL of its database.
        rows: True looks at every record; False only at the files and at what they say of one another.
    """
    return _verify_folder(place, rows) if isinstance(place, Path) else _verify_database(place, rows)


def _verify_database(url: PostgresURL, rows: bool) -> Verified:
    try:
        checker = Rows(JournalTable(Journal.open(url)))
        return Verified(url, checker.look() if rows else 0, checker.problems)
    except JournalError as error:
        return Verified(url, 0, [Problem("damaged", url.schema, str(error))])


def _verify_folder(folder: Path, rows: bool) -> Verified:
    problems: list[Problem] = []
    sibling = None
    try:
        layout.check_place(folder)
        sibling = layout.read_sibling(folder)
        if sibling is None:
            problems.append(Problem("missing", layout.SIBLING, "nothing tells whether records are missing"))
    except JournalError as error:
        problems.append(Problem("damaged", layout.SIBLING, str(error)))
    file = folder / DB_NAME
    if not file.exists() or file.stat().st_size == 0:
        problems.append(Problem("missing", DB_NAME, "the database is not there or empty"))
        return Verified(folder, 0, problems)
    count = 0
    try:
        with closing(connect(file, readonly=True)) as con:
            for (text,) in con.execute("PRAGMA integrity_check(20)").fetchall():
                if text != "ok":
                    problems.append(Problem("damaged", DB_NAME, text))
            if sibling is not None:
                _, changed = layout.check_store(folder, con, sibling)
                if changed:
                    problems.append(Problem("damaged", DB_NAME, f"settings were changed from outside: {changed}"))
            if rows:
                checker = Rows(FileTable(con))
                count = checker.look()
                problems += checker.problems
    except JournalIncomplete as error:
        problems.append(Problem("missing", DB_NAME, str(error)))
    except sqlite3.Error as error:
        problems.append(Problem("damaged", DB_NAME, str(translate(error, file))))
    except JournalError as error:
        problems.append(Problem("damaged", DB_NAME, str(error)))
    problems += [Problem("leftover", path.name, _spilled(path)) for path in sorted(folder.glob("spill-*.json"))]
    return Verified(folder, count, problems)


def _spilled(path: Path) -> str:
    try:
        orjson.loads(path.read_bytes())
    except (OSError, ValueError):
        return "a spilled reply that cannot be read; it was left alone"
    return "a paid reply that was saved beside the database; the next program that opens the journal takes it in"


def stats(place: Place) -> dict[str, Any]:
    """How large a journal is: files or tables, records by kind, runs by status.

    ``free_bytes`` and ``commits`` are None for a database, which counts neither.
    """
    if isinstance(place, PostgresURL):
        from agentflow import pgjournal

        sizes, families, statuses = pgjournal.sizes(place)
        return _stats(place, sizes, families, statuses, None, None)
    return _stats_of_folder(place)


def _stats_of_folder(folder: Path) -> dict[str, Any]:
    file = folder / DB_NAME
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    try:
        with closing(connect(file, readonly=True)) as con:
            families = con.execute(
                "SELECT substr(key, 1, instr(key, '/') - 1), COUNT(*), SUM(length(value)) FROM Cache "
                "WHERE typeof(key) = 'text' AND instr(key, '/') > 0 GROUP BY 1 ORDER BY 1"
            ).fetchall()
            statuses = dict(
                con.execute(
                    "SELECT substr(key, 3, instr(substr(key, 3), '/') - 1), COUNT(*) FROM Cache "
                    "WHERE key >= 'x/' AND key < 'x0' GROUP BY 1"
                ).fetchall()
            )
            free = con.execute("PRAGMA freelist_count").fetchone()[0] * con.execute("PRAGMA page_size").fetchone()[0]
            (commits,) = con.execute(SEQUENCE).fetchone()
    except sqlite3.Error as error:
        raise translate(error, file) from error
    return _stats(folder, sizes, families, statuses, free, int(commits))


def _stats(
    place: Place,
    sizes: dict[str, int],
    families: list[tuple[str, int, int]],
    statuses: dict[str, int],
    free: int | None,
    commits: int | None,
) -> dict[str, Any]:
    return {
        "path": str(place),
        "bytes": sum(sizes.values()),
        "free_bytes": free,
        "files": sizes,
        "commits": commits,
        "runs": statuses,
        "records": {_NAMES.get(family, family): {"rows": rows, "bytes": size or 0} for family, rows, size in families},
    }


_NAMES = {
    "r": "runs", "s": "steps", "m": "paid replies", "a": "failed attempts", "h": "tasks", "k": "keyed results",
    "e": "vectors", "c": "code", "p": "runs by input", "x": "runs by status", "z": "sleeps", "d": "steps begun",
    "ht": "tasks by run", "hu": "tasks used", "xt": "open tasks", "lease": "leases", "claim": "claims of steps",
    "due": "runs by due time", "wake": "woken runs", "ch": "runs inside runs", "cp": "callers of runs",
    "worker": "workers", "lease-worker": "leases of workers", "l": "ledger", "lr": "set aside in budgets",
    "ev": "events", "en": "count of events", "w": "waits for events", "wn": "waits for events by name",
    "sc": "schedules", "ab": "cancelled runs with something at a provider", "lease-ab": "leases of these",
    "i": "background calls", "b": "batches", "bm": "calls in batches", "bq": "requests of batches",
    "be": "errors of batches", "cs": "starts of runs inside runs", "cf": "failures of runs inside runs",
}  # fmt: skip


def backup(folder: Place, target: Path) -> Path:
    """Make a complete copy of a journal, also while programs write to it: as it was at one moment.

    The copy can be opened in place of the journal. It is the same journal as far as its id goes, so do not go on
    with both. Its ``journal.json`` is written last: a backup that was cut off does not open.

    Args:
        folder: the journal's directory.
        target: a directory that does not exist yet, or is empty.

    Raises:
        UsageError: the target holds something; or the journal is in a database, which has its own means.
        JournalIncomplete: the journal itself is not complete; see ``verify``.
    """
    if isinstance(folder, PostgresURL):
        raise UsageError(
            f"{folder}: a journal in PostgreSQL is backed up by pg_dump, as it is at one moment: "
            f"pg_dump --schema={folder.schema} -f journal.sql DATABASE. `agentflow journal copy DIR` takes its runs "
            "into a directory."
        )
    sibling = layout.read_sibling(folder)
    if sibling is None or not (folder / DB_NAME).exists():
        raise layout.missing_store(folder)
    target = Path(os.path.abspath(target.expanduser()))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} is there already and not empty. Name a new directory.")
    if target.is_relative_to(folder):
        raise UsageError(f"{target} lies inside the journal. Name a directory outside.")
    layout.check_place(target)
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chmod(target, 0o700)
    (target / ".gitignore").write_text("*\n")
    copy = target / DB_NAME
    os.close(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        with closing(connect(folder / DB_NAME, readonly=True)) as con:
            layout.check_store(folder, con, sibling)
            # In one step: a copy in several would begin anew each time somebody commits.
            with closing(sqlite3.connect(copy)) as made:
                con.backup(made)
        with closing(sqlite3.connect(copy)) as made:
            made.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            (sequence,) = made.execute(SEQUENCE).fetchone()
            (state,) = made.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        raise translate(error, folder / DB_NAME) from error
    if state != "ok":
        raise JournalIncomplete(f"{folder}: {DB_NAME} is damaged ({state}); the copy in {target} is not finished.")
    # After the records: what they do not hold yet is in these notes of what was begun.
    if (folder / "started").is_dir():
        shutil.copytree(folder / "started", target / "started")
    for spilled in folder.glob("spill-*.json"):
        shutil.copy2(spilled, target / spilled.name)
    _sync(copy)
    layout.write_sibling(target, sibling.store, sequence)
    _sync(target)
    return target


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Copied:
    """What ``copy`` did: ``runs`` (ids), ``rows``, ``skipped`` (ids that were not copied, each with the reason)."""

    runs: list[str] = field(default_factory=list)
    rows: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


def copy(source: Journal, target: Journal, run_ids: Iterable[str] | None = None) -> Copied:
    """Copy runs into another journal, with all that they need there to replay. Nothing there is replaced.

    Args:
        source: where the runs are; it is not changed.
        target: where they go.
        run_ids: their ids; runs started inside them come along. None: all runs.

    Raises:
        RunBusy: a process is executing one of ``run_ids``. With None such runs are skipped.
        RunNotFound: one is not there.
    """
    if source.id == target.id:
        raise UsageError(f"{target.path} is the same journal, or a backup of it. Name another place.")
    every = run_ids is None
    wanted = [d["id"] for d in rundocs.listed(source)][::-1] if run_ids is None else list(run_ids)
    wanted = [rundocs.find(source, run_id)["id"] for run_id in wanted]
    pointers = dict(_pointers(source))
    done: list[str] = []
    skipped: dict[str, str] = {}
    rows = 0
    while wanted:
        run_id = wanted.pop(0)
        if run_id in done or run_id in skipped:
            continue
        wanted.extend(children.children(source, run_id))
        document = rundocs.find(source, run_id)
        if document["status"] == "running":
            if not every:
                raise RunBusy(f"run {run_id} is running. Copy it when it has ended, or make a backup.", run_id)
            skipped[run_id] = "it is running"
        elif rundocs.read(target, run_id) is not None:
            skipped[run_id] = "a run of this id is there already"
        else:
            rows += _copy_run(source, target, document, pointers.get(run_id, []))
            done.append(run_id)
    return Copied(done, rows, skipped)


def _pointers(journal: Journal) -> Iterable[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for key, run_id in journal.scan("p/"):
        found.setdefault(run_id, []).append(key)
    return found.items()


def _copy_run(source: Journal, target: Journal, document: dict[str, Any], pointers: list[str]) -> int:
    run_id = document["id"]
    shared: dict[str, None] = {}
    ops: list[Op] = []
    rows = 0
    lease = acquire(target, rundocs.lease_key(run_id), what=f"run {run_id}", run_id=run_id)
    try:
        for key in keys_of(source, run_id):
            text = source.get(key)
            if text is None:
                continue
            ops.append(Add(key, text))
            if key.startswith("s/") and "!" not in key:
                shared |= dict.fromkeys(_shared(source, Row(key, text)))
            if len(ops) >= _CHUNK:
                rows += sum(target.commit(ops, fence=lease.fence))
                ops = []
        found = ((key, source.get(key)) for key in shared)
        ops += [Add(key, text) for key, text in found if text is not None]
        rows += sum(target.commit(ops, fence=lease.fence)) + 1
        for line in source.marks(run_id):
            target.mark(run_id, line)
        # The document comes last: a copy that was cut off is no run, and is finished by the next one.
        last: list[Op] = [Add(key, run_id) for key in pointers]
        last += rundocs.write({**document, "status": None}, document["status"])
    except BaseException:
        lease.release()
        raise
    lease.release(last)
    return rows


def _shared(source: Journal, row: Row) -> Iterator[str]:
    """Rows that a record needs and that other runs may need too."""
    head = row.head
    if head["code"]:
        yield f"c/{head['code']}"
    if "named" in head:
        yield from (key for key, _ in source.keys(head["named"]))
    if head["kind"] == "ai" and row.output.startswith("["):
        yield from (key for key in orjson.loads(row.output) if isinstance(key, str) and key.startswith("e/"))
