"""A journal in PostgreSQL: the same rules for several machines, whatever happens to processes, network and server.

What every journal promises is in test_journal_contract.py and test_lease.py, for both kinds.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agentflow
from agentflow import Waiting, human_task, lease, runs, step, tasks, workflow
from agentflow.errors import (
    JournalError,
    JournalForeign,
    JournalIncomplete,
    JournalReadOnly,
    JournalVersionError,
    LeaseLost,
    RunBusy,
    UsageError,
)
from agentflow.journal import Add, Drop, Fence, Journal, PostgresURL, Put, place
from agentflow.lease import acquire, alive, holder
from agentflow.pgjournal import open_schema
from agentflow.pgwriter import PgWriter
from agentflow.scratch import open_journal
from tests import test_kills
from tests.cutting import CuttingProxy
from tests.lives import Life, Lives
from tests.loopback import Loopback, answer_to
from tests.pgserver import PASSWORD, Server
from tests.programs import notes, run_program, start_program, stop_between_commits, write_program

ROOT = Path(__file__).parent.parent


@pytest.fixture
def journal(database: str) -> Journal:
    return Journal.open(database)


@pytest.fixture
def other(journal: Journal) -> Iterator[Journal]:
    """The same journal as another process sees it: with connections and a writer of its own."""
    assert isinstance(journal.path, PostgresURL)
    second = Journal(open_schema(journal.path))
    yield second
    second.close()


def until(condition: Callable[[], Any], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.005)


def owned(journal: Journal, token: int = 7) -> Fence:
    journal.commit([Put("lease/r", f'{{"token":{token},"pid":1}}')])
    return Fence("lease/r", token)


def waiting_for_locks(server: Server) -> int:
    ((count,),) = server.ask("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    return int(count)


# -- the place --------------------------------------------------------------------------------------


def test_the_url_is_shown_without_its_password_everywhere(postgres_server: Server) -> None:
    url = place("postgres://flow:p%40ss-word@db.example:5433/app?sslmode=require&password=other-secret&schema=mine")
    assert isinstance(url, PostgresURL)
    assert str(url) == f"{url}" == "postgres://flow@db.example:5433/app?sslmode=require&schema=mine"
    assert repr(url) == f"PostgresURL({str(url)!r})"
    assert url.conninfo == "postgres://flow:p%40ss-word@db.example:5433/app?sslmode=require&password=other-secret"
    assert url.schema == "mine" and place(url.whole) == url and hash(place(url.whole)) == hash(url)
    assert url.without_secrets("for p@ss-word, p%40ss-word and other-secret") == "for ***, *** and ***"
    assert place("postgresql://h/d") != url and place("postgresql://h/d").schema == "agentflow"  # type: ignore[union-attr]


@pytest.mark.parametrize("bad", ["postgresql://a@b@c/d#x", "postgresql://h/d?schema=Mine", "postgresql://h/d?schema=", 'postgresql://h/d?schema=a"b'])
def test_a_url_that_is_none_is_refused_where_it_is_named(bad: str) -> None:
    with pytest.raises(UsageError, match="postgresql://user|schema has small letters"):
        agentflow.configure(path=bad)
    with pytest.raises(UsageError, match="not by a Path"):
        agentflow.configure(path=Path("postgresql://h/d"))


def test_configure_and_the_environment_name_a_database(postgres_server: Server, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_journal().path == place(database)
    url = postgres_server.url("named_by_configure")
    agentflow.configure(path=url)
    assert open_journal().path == place(url) != place(database)
    agentflow.configure(path=None)
    assert open_journal().path == place(database)


def test_an_error_never_shows_the_password(postgres_server: Server) -> None:
    wrong = [
        postgres_server.url("x", password="wrong-word"), postgres_server.url("x", database="nowhere"),
        postgres_server.url("x").replace("127.0.0.1", "127.0.0.1:1").replace(f":1:{postgres_server.port}", ":1"),
        postgres_server.url("x") + "&nonsense=1", postgres_server.url("x") + "&sslmode=nonsense",
        f"postgresql://flow:{PASSWORD}%zz@127.0.0.1/d", f"postgresql://flow:{PASSWORD}@127.0.0.1:notaport/d",
    ]  # fmt: skip
    for url in wrong:
        with pytest.raises((JournalError, UsageError)) as caught:
            Journal.open(url)
        error: BaseException | None = caught.value
        while error is not None:
            assert PASSWORD not in str(error) and "wrong-word" not in str(error), url
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_errors_say_what_is_wrong_and_what_to_do(postgres_server: Server) -> None:
    for url, said in (
        (postgres_server.url("x", password="wrong-word"), "Check the user and the password"),
        (postgres_server.url("x", password=""), "Give the password by PGPASSWORD"),
        (postgres_server.url("x", database="nowhere"), "createdb"),
        (postgres_server.url("x", user="nobody_here"), "Check the user and the password"),
        ("postgresql://flow@127.0.0.1:1/postgres", "Check that the server runs"),
        ("postgresql://flow@no-such-host.invalid/postgres", "Check the host's name"),
    ):
        with pytest.raises(JournalError, match=said):
            Journal.open(url)


def test_a_user_without_rights_is_told_which_to_ask_for(postgres_server: Server, database: str) -> None:
    postgres_server.ask("CREATE ROLE guest LOGIN PASSWORD 'guest-word'")
    postgres_server.ask("REVOKE CREATE ON DATABASE postgres FROM guest")
    guest = {"user": "guest", "password": "guest-word"}
    with pytest.raises(JournalReadOnly, match="GRANT CREATE ON DATABASE"):
        Journal.open(postgres_server.url("of_guest", **guest))
    schema = Journal.open(database).path.schema  # type: ignore[union-attr]
    with pytest.raises(JournalReadOnly, match="GRANT USAGE"):
        Journal.open(postgres_server.url(schema, **guest))
    # A schema that somebody has made for it is enough.
    postgres_server.ask("CREATE SCHEMA of_guest AUTHORIZATION guest")
    assert Journal.open(postgres_server.url("of_guest", **guest)).commit([Add("a", "1")]) == [True]


def test_a_server_that_takes_no_changes_is_named(postgres_server: Server, database: str) -> None:
    Journal.open(database).close()
    postgres_server.ask("CREATE ROLE reader LOGIN PASSWORD 'reader-word'")
    postgres_server.ask("ALTER ROLE reader SET default_transaction_read_only = on")
    with pytest.raises(JournalError, match="standby, or made read-only"):
        Journal.open(postgres_server.url(place(database).schema, user="reader", password="reader-word"))  # type: ignore[union-attr]


def test_a_schema_that_is_dropped_while_in_use_acknowledges_nothing_more(postgres_server: Server, journal: Journal) -> None:
    journal.commit([Add("a", "1")])
    postgres_server.ask(f"DROP SCHEMA {journal.path.schema} CASCADE")  # type: ignore[union-attr]
    for use in (lambda: journal.commit([Add("b", "1")]), lambda: journal.get("a"), lambda: journal.mark("r", "x")):
        with pytest.raises(JournalIncomplete, match="somebody has dropped it"):
            use()


def test_a_schema_that_holds_something_else_is_refused_and_left_alone(postgres_server: Server) -> None:
    postgres_server.ask("CREATE SCHEMA thesis")
    postgres_server.ask("CREATE TABLE thesis.chapters (n int)")
    with pytest.raises(JournalForeign, match=r"thesis holds something else.*chapters.*schema="):
        Journal.open(postgres_server.url("thesis"))
    assert postgres_server.ask("SELECT relname FROM pg_class WHERE relnamespace = 'thesis'::regnamespace") == [("chapters",)]


@pytest.mark.parametrize("what", ["layout", "digest", "tables"])
def test_an_unknown_version_is_refused_and_never_rewritten(postgres_server: Server, database: str, what: str) -> None:
    opened = Journal.open(database)
    schema = place(database).schema  # type: ignore[union-attr]
    opened.close()
    postgres_server.ask(f"UPDATE {schema}.about SET value = '99' WHERE key = %s", what)
    with pytest.raises(JournalVersionError, match="version 99; this agentflow knows 1"):
        Journal.open(database)
    assert postgres_server.ask(f"SELECT value FROM {schema}.about WHERE key = %s", what) == [("99",)]


def test_a_database_that_has_no_place_for_every_character_is_refused(postgres_server: Server) -> None:
    postgres_server.ask("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' LOCALE_PROVIDER libc TEMPLATE template0")
    with pytest.raises(JournalError, match=r"LATIN1.*--encoding=UTF8"):
        Journal.open(postgres_server.url(database="latin"))


def test_a_server_without_fsync_is_warned_of(postgres_server: Server, database: str, said: Callable[[], str]) -> None:
    def set_fsync(value: str) -> None:
        postgres_server.ask(f"ALTER SYSTEM SET fsync = {value}")
        postgres_server.ask("SELECT pg_reload_conf()")
        until(lambda: postgres_server.ask("SHOW fsync") == [(value,)], "it is set")

    set_fsync("off")
    try:
        Journal.open(database)
        assert "fsync=off: a power loss" in said()
    finally:
        set_fsync("on")


def test_without_psycopg_the_error_names_the_extra(tmp_path: Path) -> None:
    code = "import sys; sys.modules['psycopg'] = None\nfrom agentflow.journal import Journal\nJournal.open('postgresql://u:pw-of-u@h/d')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "UsageError: a journal in PostgreSQL needs psycopg" in done.stderr and "agentflow[postgres]" in done.stderr


def test_a_journal_in_files_loads_nothing_of_postgres(tmp_path: Path) -> None:
    code = (
        "import sys; from agentflow.journal import Journal, Add; Journal.open(sys.argv[1]).commit([Add('x', '1')])\n"
        "print([name for name in sys.modules if name.startswith(('psycopg', 'agentflow.pg', 'agentflow.postgres'))])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "j")], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "['agentflow.pgurl']"


def test_commits_are_synced_whatever_the_role_says(postgres_server: Server, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    postgres_server.ask("ALTER ROLE flow SET synchronous_commit = off")
    seen: list[Any] = []
    perform = PgWriter._perform

    def look(self: PgWriter, job: Any, txn: Any, con: Any, *, only: bool) -> None:
        seen.append(con.execute("SHOW synchronous_commit").fetchone()[0])
        perform(self, job, txn, con, only=only)

    monkeypatch.setattr(PgWriter, "_perform", look)
    try:
        Journal.open(database).guarded(lambda txn: txn.put("a", "1"))
    finally:
        postgres_server.ask("ALTER ROLE flow RESET synchronous_commit")
    assert seen == ["on"]


def test_a_text_that_postgres_cannot_hold_is_refused_and_harms_nobody_else(journal: Journal) -> None:
    async def together() -> list[Any]:
        commits = [journal.acommit([Add(f"k{n}", "a\x00b" if n == 1 else "v")]) for n in range(3)]
        return await asyncio.gather(*commits, return_exceptions=True)

    assert [type(result) for result in asyncio.run(together())] == [list, UsageError, list]
    with pytest.raises(JournalError, match="longer than PostgreSQL's index takes"):
        journal.commit([Add("".join(random.choices("abcdefghijklmnop", k=20_000)), "v")])
    assert [key for key, _ in journal.keys("")] == ["k0", "k2"]


# -- who may commit when ----------------------------------------------------------------------------


@pytest.fixture
def halted(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Commits of ops halt between the look at their lease and their writes; the events say so, and let them go on."""
    there, go_on = threading.Event(), threading.Event()
    real = PgWriter._apply

    def halting(self: PgWriter, txn: Any, jobs: Any, leases: Any) -> None:
        if any(op.key == "halts" for job in jobs for op in job.ops):
            there.set()
            assert go_on.wait(60)
        real(self, txn, jobs, leases)

    monkeypatch.setattr(PgWriter, "_apply", halting)
    return there, go_on


@pytest.mark.parametrize("how", ["taken over", "put", "dropped"])
def test_a_lease_cannot_change_hands_while_a_commit_under_it_is_on_its_way(
    how: str, journal: Journal, other: Journal, halted: Any, postgres_server: Server
) -> None:
    there, go_on = halted
    fence = owned(journal)
    order: list[str] = []
    results: list[Any] = []

    def commit() -> None:
        results.append(journal.commit([Add("halts", "1")], fence=fence))
        order.append("commit")

    def change() -> None:
        if how == "taken over":
            other.guarded(lambda txn: txn.put("lease/r", '{"token":8,"pid":2}'))
        else:
            other.commit([Put("lease/r", '{"token":8,"pid":2}') if how == "put" else Drop("lease/r")])
        order.append("change")

    threads = [threading.Thread(target=commit), threading.Thread(target=change)]
    threads[0].start()
    assert there.wait(60)
    threads[1].start()
    until(lambda: waiting_for_locks(postgres_server) == 1 or order, "the change waits")
    assert order == [], "the lease changed hands under the commit"
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert results == [[True]] and journal.get("halts") == "1"
    with pytest.raises(LeaseLost):
        journal.commit([Add("late", "1")], fence=fence)
    assert other.get("late") is None


@pytest.mark.parametrize("ends", ["COMMIT", "ROLLBACK"])
def test_a_commit_waits_for_a_change_of_its_lease_and_sees_it(
    ends: str, journal: Journal, postgres_server: Server
) -> None:
    fence = owned(journal)
    schema = journal.path.schema  # type: ignore[union-attr]
    results: list[Any] = []

    def commit() -> None:
        try:
            results.append(journal.commit([Add("a", "1")], fence=fence))
        except LeaseLost as error:
            results.append(type(error))

    with postgres_server.session() as session:  # somebody who knows nothing of the journal's lock
        session.execute("BEGIN")
        session.execute(f"""UPDATE {schema}.records SET value = '{{"token":8,"pid":2}}' WHERE key = 'lease/r'""")
        thread = threading.Thread(target=commit)
        thread.start()
        until(lambda: waiting_for_locks(postgres_server) == 1 or results, "the commit waits")
        assert not results
        session.execute(ends)
        thread.join(60)
    assert results == ([LeaseLost] if ends == "COMMIT" else [[True]])
    assert journal.get("a") == (None if ends == "COMMIT" else "1")


def test_plain_commits_of_several_processes_do_not_wait_for_one_another(journal: Journal, other: Journal, halted: Any) -> None:
    there, go_on = halted
    thread = threading.Thread(target=journal.commit, args=([Add("halts", "1")],))
    thread.start()
    assert there.wait(60)
    try:
        assert other.commit([Add("b", "1")]) == [True]
        assert not thread.ident or thread.is_alive()
    finally:
        go_on.set()
        thread.join(60)


def test_what_a_guarded_function_has_read_is_not_changed_by_a_plain_commit(journal: Journal, other: Journal, postgres_server: Server) -> None:
    seen: list[str | None] = []
    threads: list[threading.Thread] = []

    def decide(txn: Any) -> None:
        seen.append(txn.get("task"))
        if not threads:
            threads.append(threading.Thread(target=other.commit, args=([Put("task", "withdrawn")],)))
            threads[0].start()
            until(lambda: waiting_for_locks(postgres_server) == 1 or not threads[0].is_alive(), "the commit waits")
        seen.append(txn.get("task"))
        txn.put("decision", "approved")

    journal.commit([Put("task", "open")])
    journal.guarded(decide)
    threads[0].join(60)
    assert seen == ["open", "open"] and journal.get("task") == "withdrawn"


def test_a_record_that_two_add_at_once_is_of_the_first_and_the_other_is_told(journal: Journal, other: Journal, halted: Any) -> None:
    there, go_on = halted
    results: dict[str, Any] = {}
    first = threading.Thread(target=lambda: results.update(first=journal.commit([Add("halts", "1"), Add("k", "first")])))
    first.start()
    assert there.wait(60)
    assert other.commit([Add("k", "second")]) == [True]
    go_on.set()
    first.join(60)
    assert results == {"first": [True, False]} and journal.get("k") == "second"


@pytest.mark.torture
def test_a_commit_that_the_server_ends_to_resolve_a_deadlock_is_repeated(postgres_server: Server, database: str) -> None:
    # Whose patience with a lock ends first looks for a deadlock, and is the one to go.
    postgres_server.ask("ALTER ROLE flow SET deadlock_timeout = '3s'")
    try:
        journal = Journal.open(database)
        journal.commit([Add("a", "0"), Add("b", "0")])
        records = f"{journal.path.schema}.records"  # type: ignore[union-attr]
        results: list[Any] = []
        with postgres_server.session() as session:
            session.execute("SET deadlock_timeout = '60s'")
            session.execute("BEGIN")
            session.execute(f"UPDATE {records} SET value = 'theirs' WHERE key = 'b'")
            thread = threading.Thread(target=lambda: results.append(journal.commit([Put("a", "ours"), Put("b", "ours")])))
            thread.start()
            until(lambda: waiting_for_locks(postgres_server) == 1, "the commit has a, and waits for b")
            session.execute(f"UPDATE {records} SET value = 'theirs' WHERE key = 'a'")  # waits for the commit to be ended
            session.execute("COMMIT")
            thread.join(60)
    finally:
        postgres_server.ask("ALTER ROLE flow RESET deadlock_timeout")
    assert results == [[True, True]] and (journal.get("a"), journal.get("b")) == ("ours", "ours")


def test_rows_written_out_of_order_are_read_all_the_same(journal: Journal, other: Journal, halted: Any) -> None:
    """Row numbers are drawn before the commit, so that a lower one may come to light later."""
    there, go_on = halted
    journal.commit([Add("s/r/0", "v")])
    started = threading.Thread(target=journal.commit, args=([Add("s/r/1", "v"), Add("halts", "1")],))
    started.start()
    assert there.wait(60)
    other.commit([Add("s/r/2", "v")])
    first = other.rows("s/r/", from_rowid=0, limit=10)
    go_on.set()
    started.join(60)
    assert [key for _, key, _ in first] == ["s/r/0", "s/r/2"]
    rows = other.rows("s/r/", from_rowid=0, limit=10)
    assert sorted(key for _, key, _ in rows) == ["s/r/0", "s/r/1", "s/r/2"]
    assert [rowid for rowid, _, _ in rows] == sorted(dict(other.keys("s/r/")).values())


# -- leases over machines ---------------------------------------------------------------------------


def elsewhere(journal: Journal, **changes: Any) -> None:
    """The lease's owner was another machine."""
    row = json.loads(journal.get("lease/r") or "")
    row |= {"host": "far", "boot": "other/pid:[1]", "owner": "x", "pid": 2**22 + 1, **changes}
    journal.commit([Put("lease/r", json.dumps(row, separators=(",", ":")))])


@pytest.mark.parametrize("ahead", [3600, -3600])
def test_how_far_the_clocks_of_machines_are_apart_does_not_matter(
    ahead: float, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire(journal, "lease/r", what="run r")
    elsewhere(journal)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    with pytest.raises(RunBusy, match=r"process \d+ on far.*it can be taken over in (29|30)\."):
        acquire(journal, "lease/r", what="run r")
    found = holder(journal, "lease/r")
    assert found is not None and alive(found, now=journal.clock())
    elsewhere(journal, expires=journal.clock() - 1)
    mine = acquire(journal, "lease/r", what="run r")
    assert mine.token == 2
    found = holder(journal, "lease/r")
    assert found is not None and abs(found.expires - 30 - real()) < 5, "by the clock of the server, which is this machine's"


def test_another_machine_of_the_same_name_is_not_taken_for_an_earlier_boot(journal: Journal) -> None:
    acquire(journal, "lease/r", what="run r")
    import platform

    elsewhere(journal, host=platform.node())
    found = holder(journal, "lease/r")
    assert found is not None and not lease.gone(journal, found)


def test_whether_a_process_elsewhere_still_runs_is_told_by_its_lease(journal: Journal, other: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = lease.this_process(journal)
    far = mine | {"host": "far", "boot": "other/pid:[1]"}
    assert lease.process_alive(other, mine, other.get) and lease.process_alive(other, far, other.get)
    assert not lease.process_alive(other, far | {"owner": "never-shown"}, other.get)
    later = journal.clock() + 31
    monkeypatch.setattr(other, "clock", lambda: later)
    assert not lease.process_alive(other, far, other.get), "its lease has run out"
    assert lease.process_alive(other, mine, other.get), "here the process itself is looked at"


HOSTS = """
    import platform, time
    from agentflow import lease

    HOST = os.environ.get("HOST")
    if HOST:  # another machine: its processes cannot be seen from here, nor ours from there
        platform.node = lambda: HOST
        lease._boot = lambda: HOST + "/pid:[1]"
        lease._myself.cache_clear()

    def work(name):
        note(f"ran {name} {HOST}")
        if os.environ.get("GATE") and name == "second":
            while not (HERE / os.environ["GATE"]).exists():
                time.sleep(0.005)
            note(f"left {name} {HOST}")
        return f"{name} by {HOST}"

    @workflow("job")
    async def job(ctx, n: int):
        first = await step("first", work, "first")
        second = await step("second", work, "second")
        third = await step("third", work, "third")
        return [first, second, third]

    @workflow("ask")
    async def ask(ctx, n: int):
        before = await step("before", work, "before")
        yes = await human_task("approve", title="Go on?", data=n)
        return [before, await step("after", work, "after"), yes.by]
"""


@pytest.fixture(scope="module")
def server_of_lives() -> Iterator[Lives]:
    made = Lives()
    yield made
    made.close()


@pytest.fixture
def lives(server_of_lives: Lives, tmp_path: Path) -> Iterator[Lives]:
    """Starts programs that need not import anything first."""
    server_of_lives.folder = tmp_path
    server_of_lives.env = {"AGENTFLOW_LEASE_SECONDS": "1.5"}
    yield server_of_lives
    while server_of_lives.all:
        server_of_lives.all.pop().kill()


def worker(lives: Lives, host: str, *options: str) -> Life:
    write_program(HOSTS, lives.folder, "app.py")
    return lives.start(None, "worker", "app:job", "app:ask", *options, env={"HOST": host})


def test_a_worker_on_another_machine_takes_over_when_the_lease_has_run_out(database: str, lives: Lives, tmp_path: Path) -> None:
    source = HOSTS + "\n    job.options(run_id='r').run_sync(1)\n"
    first = lives.start(source, env={"HOST": "a", "GATE": "never"})
    until(lambda: "ran second a" in notes(tmp_path), "the first machine is at work")
    second = worker(lives, "b")
    until(lambda: second.alive() and any("worker/" in key for key, _ in open_journal().keys("worker/")), "it is up")
    assert runs.get("r").status == "running" and "ran second b" not in notes(tmp_path)
    first.kill()
    killed = time.monotonic()
    until(lambda: runs.get("r").status == "completed", "the second machine has finished the run")
    assert time.monotonic() - killed < 30
    second.signal(signal.SIGTERM)
    ended = second.end()
    assert runs.get("r").output == ["first by a", "second by b", "third by b"]
    assert Counter(notes(tmp_path)) == {"ran first a": 1, "ran second a": 1, "ran second b": 1, "ran third b": 1}
    assert ended.code == 0 and "second: in doubt" in ended.err, "what was started on the other machine is known here"


def test_an_owner_paused_past_its_lease_on_another_machine_commits_nothing_when_it_wakes(database: str, lives: Lives, tmp_path: Path) -> None:
    source = HOSTS + "\n    print(job.options(run_id='r').run_sync(1))\n"
    first = start_program(source, tmp_path, env={"HOST": "a", "GATE": "late", "AGENTFLOW_LEASE_SECONDS": "1.5"})
    until(lambda: "ran second a" in notes(tmp_path), "the first machine is at work")
    stop_between_commits(open_journal().path, first.pid)
    try:
        second = worker(lives, "b")
        until(lambda: runs.get("r").status == "completed", "the second machine has finished the run")
    finally:
        (tmp_path / "late").touch()
        first.send_signal(signal.SIGCONT)
    _, err = first.communicate(timeout=60)
    assert first.returncode != 0 and "LeaseLost" in err
    assert runs.get("r").output == ["first by a", "second by b", "third by b"] and "ran third a" not in notes(tmp_path)
    second.signal(signal.SIGTERM)
    assert second.end().code == 0


def test_a_task_is_answered_by_another_process_and_a_worker_elsewhere_goes_on(database: str, lives: Lives, tmp_path: Path) -> None:
    source = HOSTS + "\n    ask.options(run_id='r').run_sync(1)\n"
    assert "Waiting" in lives.run(source, env={"HOST": "a"}, code=1).err
    (task,) = tasks.list()
    lives.run(None, "tasks", "approve", task.id, "--by", "ann")
    ended = worker(lives, "b", "--once").end()
    assert ended.code == 0, ended.err
    assert runs.get("r").output == ["before by a", "after by b", "ann"]
    assert Counter(notes(tmp_path)) == {"ran before a": 1, "ran after b": 1}


# -- workflows --------------------------------------------------------------------------------------


async def test_a_workflow_with_a_fan_out_retries_and_model_calls_is_replayed_for_nothing(
    database: str, loopback: Callable[..., Loopback], again: Callable[[], None]
) -> None:
    server = loopback()
    agentflow.configure(model="openai:gpt-4o-mini")
    ran: Counter[str] = Counter()

    def flaky() -> str:
        ran["flaky"] += 1
        if ran["flaky"] < 3:
            raise ConnectionError("down")
        return "up"

    @workflow("busy")
    async def busy(ctx: Any) -> list[Any]:
        async def branch(n: int) -> str:
            return await agentflow.generate_content(f"question {n}", name="ask")

        answers = await asyncio.gather(*[branch(n) for n in range(12)])
        state = await step("flaky", flaky, retry=agentflow.Retry(max_attempts=3, initial_delay=0.001, jitter=False))
        return [*answers, state]

    expected = [*[answer_to(f"question {n}") for n in range(12)], "up"]
    for _ in range(3):
        assert await busy.run() == expected
        again()
        open_journal().close()
    assert len(server.arrived) == 12 and ran == {"flaky": 3}
    assert [each.name for each in runs.list()[0].steps].count("ask") == 12


def test_a_step_under_one_key_that_eight_processes_ask_for_is_run_once(database: str, lives: Lives, tmp_path: Path) -> None:
    source = """
    import time

    def charge():
        note(f"ran {os.getpid()}")
        time.sleep(0.05)
        return os.getpid()

    @workflow
    async def pay(ctx, customer: int):
        return await step("charge", charge, idempotency_key="order-7")

    note("ready")
    while not (HERE / "go").exists():
        time.sleep(0.002)
    print(pay.run_sync(int(sys.argv[1])))
    """
    started = [lives.start(source, str(n)) for n in range(8)]
    until(lambda: notes(tmp_path).count("ready") == 8, "all are up", 120)
    (tmp_path / "go").touch()
    ended = [life.end() for life in started]
    assert len({each.out for each in ended}) == 1 and ended[0].out.strip(), ended
    assert sum(line.startswith("ran ") for line in notes(tmp_path)) == 1


def test_kills_at_random_moments_lose_nothing_acknowledged_and_repeat_nothing_finished(database: str, tmp_path: Path) -> None:
    test_kills.killed(tmp_path, 20)


@pytest.mark.torture
def test_two_hundred_kills_lose_nothing_acknowledged_and_repeat_nothing_finished(database: str, tmp_path: Path) -> None:
    test_kills.killed(tmp_path, 200)


@pytest.mark.torture
@pytest.mark.parametrize("file", ["once", "events", "children", "control", "ownership", "moves"])
def test_what_holds_for_files_holds_here(file: str) -> None:
    """Whole files of tests, which know nothing of databases, with their journals in one."""
    env = {**os.environ, "AGENTFLOW_TESTS_IN": "postgres"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider", f"tests/test_{file}.py"],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]


# -- the network and the server -----------------------------------------------------------------------


@pytest.fixture
def cutting(postgres_server: Server, database: str) -> Iterator[tuple[CuttingProxy, Journal]]:
    """A journal behind a network that can be cut at a COMMIT."""
    schema = place(database).schema  # type: ignore[union-attr]
    with CuttingProxy(postgres_server.port, b"COMMIT\0") as proxy:
        # Encrypted, the word could not be seen.
        url = postgres_server.url(schema).replace(str(postgres_server.port), str(proxy.port)) + "&sslmode=disable"
        journal = Journal.open(url)
        yield proxy, journal
        journal.close()


@pytest.mark.parametrize("cut", ["request", "reply"])
def test_a_connection_that_breaks_at_a_commit_does_nothing_twice_and_loses_nothing(
    cut: str, cutting: tuple[CuttingProxy, Journal]
) -> None:
    proxy, journal = cutting
    count = [0]

    def raised(txn: Any) -> int:
        count[0] += 1
        value = int(txn.get("n") or 0) + 1
        txn.put("n", str(value))
        return value

    journal.commit([Add("first", "1")])
    proxy.cut = cut
    assert journal.guarded(raised) == 1 and journal.get("n") == "1"
    assert count == [1 if cut == "reply" else 2], "what was done is not done again"
    proxy.cut = cut
    assert journal.commit([Add("a", "1"), Put("p", "1")]) == [True, True], "it was this one that added the record"
    proxy.cut = cut
    assert journal.commit([Add("b", "paid")], paid=True) == [True]
    assert proxy.cuts == 3 and [journal.get(key) for key in "abp"] == ["1", "paid", "1"]
    assert journal.guarded(raised) == 2


@pytest.mark.parametrize("cut", ["request", "reply"])
async def test_commits_together_share_the_fate_of_a_broken_connection(cut: str, cutting: tuple[CuttingProxy, Journal]) -> None:
    proxy, journal = cutting
    fence = owned(journal)
    proxy.cut = cut
    results = await asyncio.gather(
        *[journal.acommit([Add(f"k{n}", "v")], fence=fence if n != 3 else Fence("lease/r", 1)) for n in range(8)], return_exceptions=True
    )
    assert [type(result) for result in results] == [list] * 3 + [LeaseLost] + [list] * 4
    assert all(result == [True] for n, result in enumerate(results) if n != 3) and proxy.cuts == 1
    assert [key for key, _ in journal.keys("k")] == ["k0", "k1", "k2", "k4", "k5", "k6", "k7"]


def test_a_commit_that_the_server_has_yet_to_hear_of_is_waited_for(
    cutting: tuple[CuttingProxy, Journal], postgres_server: Server
) -> None:
    proxy, journal = cutting
    journal.commit([Put("n", "0")])
    counts: list[int] = []

    def count(txn: Any) -> int:
        counts.append(int(txn.get("n")))
        txn.put("n", str(counts[-1] + 1))
        return counts[-1] + 1

    proxy.cut = "late"
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(journal.guarded(count)))
    thread.start()
    until(lambda: waiting_for_locks(postgres_server) == 1 or results, "the process has come back, and waits")
    proxy.go_on.set()
    thread.join(60)
    assert (results, counts, journal.get("n")) == ([1], [0], "1"), "it was done twice"


def test_a_lease_taken_at_a_broken_connection_is_held_by_the_one_who_took_it(cutting: tuple[CuttingProxy, Journal]) -> None:
    proxy, journal = cutting
    journal.commit([Add("first", "1")])
    proxy.cut = "reply"
    taken = acquire(journal, "lease/r", what="run r")
    assert taken.token == 1 and journal.commit([Add("a", "1")], fence=taken.fence) == [True]


COMMITTER = """
import sys
from agentflow.journal import Add, Journal, Put
journal = Journal.open(sys.argv[1])
number = 0
while True:
    added = journal.commit([Add(f"k/{number:06d}", "v"), Put("last", str(number))])
    count = journal.guarded(lambda txn: (txn.put("n", str(int(txn.get("n") or 0) + 1)), txn.get("n"))[1])
    print(number, added[0], count, flush=True)
    number += 1
"""


def test_a_server_that_crashes_and_comes_back_loses_nothing_acknowledged(postgres_server: Server, database: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMITTER, database], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    lines: list[str] = []
    try:
        for _ in range(2):
            lines += [process.stdout.readline() for _ in range(20)]
            postgres_server.crash()
            postgres_server.start()
        lines += [process.stdout.readline() for _ in range(20)]
    finally:
        process.kill()
        rest, err = process.communicate()
    lines += rest.splitlines()
    told = [line.split() for line in lines if len(line.split()) == 3]
    assert [int(words[0]) for words in told] == list(range(len(told))) and len(told) >= 60, err
    assert {words[1] for words in told} == {"True"}, "a record of its own was taken for somebody else's"
    assert [int(words[2]) for words in told] == list(range(1, len(told) + 1)), "something was done twice, or is lost"
    assert "no connection to the journal's server" in err
    journal = Journal.open(database)
    assert [key for key, _ in journal.keys("k/")][: len(told)] == [f"k/{n:06d}" for n in range(len(told))]


def test_a_run_goes_on_after_the_server_has_crashed_in_its_middle(
    postgres_server: Server, database: str, loopback: Callable[..., Loopback], tmp_path: Path
) -> None:
    server = loopback()
    source = """
    import time

    def wait():
        note("waits")
        while not (HERE / "go").exists():
            time.sleep(0.005)
        return "waited"

    @workflow("through")
    async def through(ctx):
        first = await generate_content("one", name="one")
        waited, paid = await asyncio.gather(step("wait", wait), generate_content("two", name="two"))
        return [first, waited, paid, await generate_content("three", name="three")]

    print(through.options(run_id="r").run_sync())
    """
    process = start_program(source, tmp_path, env={**server.environment, "AGENTFLOW_MODEL": "openai:gpt-4o-mini"})
    until(lambda: "waits" in notes(tmp_path) and len(server.answered) == 2, "two calls are paid for")
    postgres_server.crash()
    (tmp_path / "go").touch()
    postgres_server.start()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.strip() == str([answer_to("one"), "waited", answer_to("two"), answer_to("three")])
    assert len(server.arrived) == 3 and runs.get("r").status == "completed"


@pytest.mark.torture
def test_a_paid_reply_outlives_a_server_that_is_away_for_good(
    postgres_server: Server, database: str, loopback: Callable[..., Loopback], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = loopback({"text": "slow"})
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("AGENTFLOW_PAID_RETRY_SECONDS", "0.3")
    source = """
    import agentflow.postgres

    if os.environ.get("AWAY"):
        agentflow.postgres.PATIENCE = 1.0

    @workflow("once")
    async def once(ctx):
        note("asks")
        return await generate_content("hello", name="greet")

    print(once.options(run_id="r").run_sync())
    """
    env = {**server.environment, "AGENTFLOW_MODEL": "openai:gpt-4o-mini"}
    server.latency = 1.0
    process = start_program(source, tmp_path, env={**env, "AWAY": "1"})
    until(lambda: len(server.arrived) == 1, "the call is on its way")
    postgres_server.stop()
    try:
        _, err = process.communicate(timeout=120)
    finally:
        postgres_server.start()
    assert process.returncode != 0 and "was saved in" in err and "no connection to the journal's server" in err, err
    assert PASSWORD not in err
    ended = run_program(source, tmp_path, env=env)
    assert ended.out.strip() == "slow" and len(server.arrived) == 1, "the reply that was saved is used"


@pytest.mark.torture
def test_a_process_stopped_inside_a_transaction_holds_up_the_others_for_ten_seconds_at_most(journal: Journal, database: str) -> None:
    code = """
import os, signal, sys, time
from agentflow.journal import Add, Journal
journal = Journal.open(sys.argv[1])
def stopped(txn):
    txn.put("half", "1")
    if not os.path.exists(sys.argv[2]):
        open(sys.argv[2], "w").close()
        os.kill(os.getpid(), signal.SIGSTOP)
        while not os.path.exists(sys.argv[3]):  # kill() returns before all threads have stopped
            time.sleep(0.01)
journal.guarded(stopped)
print(journal.commit([Add("late", "1")]), flush=True)
"""
    flag = Path(os.environ.get("TMPDIR", "/tmp")) / f"stopped-{os.getpid()}-{random.random()}"
    go = Path(f"{flag}-go")
    command = [sys.executable, "-c", code, database, str(flag), str(go)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    until(flag.exists, "it has stopped")
    began = time.monotonic()
    assert journal.guarded(lambda txn: txn.get("half")) is None
    assert 5 < time.monotonic() - began < 25
    go.touch()
    os.kill(child.pid, signal.SIGCONT)
    assert child.communicate(timeout=60)[0] == "[True]\n", "it repeats what the server has ended"
    assert journal.get("half") == "1"
    flag.unlink()
    go.unlink()


# -- looking after it -------------------------------------------------------------------------------


def fill() -> None:
    def make(n: int) -> str:
        return "made " * n

    @workflow("made")
    async def made(ctx: Any, n: int) -> str:
        return await step("make", make, n)

    @workflow("asked")
    async def asked(ctx: Any) -> bool:
        return bool(await human_task("approve", title="Ok?"))

    for n in range(3):
        made.run_sync(n)
    with pytest.raises(Waiting):
        asked.run_sync()


def test_commands_speak_of_a_database_and_show_no_password(postgres_server: Server, database: str, lives: Lives) -> None:
    url = postgres_server.url(place(database).schema)  # type: ignore[union-attr]
    env = {"AGENTFLOW_PATH": url}
    said = [lives.run(None, "journal", "verify", env={"AGENTFLOW_PATH": postgres_server.url("nothing_yet")}, code=4)]
    said.append(lives.run(None, "doctor", env={"AGENTFLOW_PATH": postgres_server.url("nothing_yet")}))
    assert "none yet" in said[-1].out
    assert postgres_server.ask("SELECT 1 FROM pg_namespace WHERE nspname = 'nothing_yet'") == [], "looking creates nothing"
    fill()
    said.append(lives.run(None, "runs", "list", env=env))
    assert "made-" in said[-1].out
    said.append(lives.run(None, "doctor", env=env))
    assert "PostgreSQL" in said[-1].out and "fsync" in said[-1].out and "3 completed" in said[-1].out
    said.append(lives.run(None, "journal", "verify", "--json", env=env))
    verified = json.loads(said[-1].out)
    assert verified["ok"] and verified["rows"] > 10 and verified["problems"] == []
    said.append(lives.run(None, "journal", "stats", "--json", env=env))
    stats = json.loads(said[-1].out)
    assert stats["runs"] == {"completed": 3, "waiting": 1} and stats["records"]["steps"]["rows"] == 3
    assert set(stats["files"]) == {"about", "records", "marks", "writers"} and stats["bytes"] > 0
    said.append(lives.run(None, "journal", "stats", env=env))
    said.append(lives.run(None, "journal", "backup", "x", env=env, code=2))
    assert "pg_dump --schema=" in said[-1].err
    said.append(lives.run(None, "runs", "show", "nonsense", env=env, code=4))
    said.append(lives.run(None, "runs", "list", env={"AGENTFLOW_PATH": url.replace(PASSWORD, "wrong-word")}, code=1))
    assert "Check the user and the password" in said[-1].err
    for each in said:
        assert PASSWORD not in each.out + each.err and "wrong-word" not in each.out + each.err


def test_verify_finds_what_is_missing_in_a_database(database: str) -> None:
    from agentflow import upkeep

    fill()
    assert upkeep.verify(place(database))
    journal = open_journal()
    (key, *_) = [key for key, _ in journal.keys("c/")]
    journal.commit([Drop(key)])
    found = upkeep.verify(place(database))
    assert not found and {problem.kind for problem in found.problems} == {"missing"}
    assert all(problem.where == key for problem in found.problems)


def test_runs_move_from_a_directory_into_a_database_and_back(postgres_server: Server, database: str, lives: Lives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: Callable[[], None]) -> None:
    ran: list[int] = []

    def make(n: int) -> str:
        ran.append(n)
        return f"made {n}"

    @workflow("made")
    async def made(ctx: Any, n: int) -> str:
        return await step("make", make, n)

    def look(where: str) -> None:
        monkeypatch.setenv("AGENTFLOW_PATH", where)
        again()

    look(str(tmp_path / "one"))
    for n in range(3):
        made.run_sync(n)
    moved = lives.run(None, "journal", "copy", postgres_server.url(place(database).schema), env={"AGENTFLOW_PATH": str(tmp_path / "one")})  # type: ignore[union-attr]
    assert "3 runs" in moved.err and PASSWORD not in moved.out + moved.err
    look(database)
    assert [made.run_sync(n) for n in range(3)] == ["made 0", "made 1", "made 2"] and ran == [0, 1, 2]
    made.run_sync(7)
    lives.run(None, "journal", "copy", str(tmp_path / "two"), env={"AGENTFLOW_PATH": database})
    look(str(tmp_path / "two"))
    assert made.run_sync(7) == "made 7" and ran == [0, 1, 2, 7]
    assert len(runs.list()) == 4
