"""Scheduled workflows: each tick is one run, whatever happens to workers, clocks and code."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import orjson
import pytest

import agentflow.sync
from agentflow import UsageError, cron, runs, schedules, step, worker, workflow
from agentflow.cli.app import run as command
from agentflow.settings import settings
from agentflow.testing import FakeClock
from tests.programs import environment, notes, running, write_program

BERLIN = ZoneInfo("Europe/Berlin")


# -- when it ticks -----------------------------------------------------------------------------------


def ticks(text: str, zone: str, start: datetime, count: int) -> list[str]:
    """The next ticks, in UTC."""
    schedule = cron.parsed(text, zone, "latest")
    each = schedule.after(start.replace(tzinfo=ZoneInfo(zone)).timestamp())
    return [f"{datetime.fromtimestamp(next(each), UTC):%d %H:%M}" for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "zone", "start", "expected"),
    [
        ("0 9 * * MON", "UTC", datetime(2026, 11, 24), ["30 09:00", "07 09:00"]),
        ("0 9 * * 1", "Europe/Berlin", datetime(2026, 11, 24), ["30 08:00", "07 08:00"]),
        ("@daily", "UTC", datetime(2026, 11, 24, 0), ["25 00:00", "26 00:00"]),
        ("0 0 L * *", "UTC", datetime(2026, 1, 31), ["28 00:00", "31 00:00"]),
        # Clocks go from 02:00 to 03:00 on 29 March: 02:30 does not exist and runs at 03:00, which is 01:00 UTC.
        ("30 2 * * *", "Europe/Berlin", datetime(2026, 3, 28, 2), ["28 01:30", "29 01:00", "30 00:30"]),
        ("0,30 2 * * *", "Europe/Berlin", datetime(2026, 3, 28, 3), ["29 01:00", "30 00:00", "30 00:30"]),
        ("*/15 2 * * *", "Europe/Berlin", datetime(2026, 3, 28, 3), ["29 01:00", "30 00:00", "30 00:15"]),
        ("30 */2 * * *", "Europe/Berlin", datetime(2026, 3, 29), ["28 23:30", "29 01:00", "29 02:30"]),
        # Clocks go back from 03:00 to 02:00 on 25 October: 02:30 comes twice and runs the first time only.
        ("30 2 * * *", "Europe/Berlin", datetime(2026, 10, 24, 3), ["25 00:30", "26 01:30"]),
        ("*/30 2 * * *", "Europe/Berlin", datetime(2026, 10, 24, 3), ["25 00:00", "25 00:30", "26 01:00"]),
        ("0 */2 * * *", "Europe/Berlin", datetime(2026, 10, 25, 1), ["25 00:00", "25 03:00"]),
        # Every hour goes by real time: none is left out and none comes twice.
        ("0 * * * *", "Europe/Berlin", datetime(2026, 3, 29, 1), ["29 01:00", "29 02:00"]),
        ("0 0-23 * * *", "Europe/Berlin", datetime(2026, 10, 25, 1), ["25 00:00", "25 01:00", "25 02:00"]),
        ("*/30 * * * *", "Europe/Berlin", datetime(2026, 10, 25, 2), ["25 00:30", "25 01:00", "25 01:30", "25 02:00"]),
        # Samoa left out all of 30 December 2011.
        ("0 12 30 12 *", "Pacific/Apia", datetime(2011, 12, 1), ["30 10:00", "29 22:00"]),
    ],
)
def test_a_local_time_runs_once_whatever_the_clocks_do(text, zone, start, expected):
    assert ticks(text, zone, start, len(expected)) == expected


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "UTC", "Asia/Kathmandu"])
@pytest.mark.parametrize("text", ["30 2 * * *", "*/20 1-3 * * *", "15 * * * *", "0 */3 * * *", "5 4 * * SUN"])
def test_ticks_are_the_same_wherever_one_begins_to_look(zone, text):
    """A worker that was started later, even between two passes of one local hour, reckons the same ticks."""
    schedule = cron.parsed(text, zone, "latest")
    begin = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    year = []
    for tick in schedule.after(begin):
        if tick > begin + 366 * 86400:
            break
        year.append(tick)
    assert all(one < other for one, other in zip(year, year[1:]))
    assert len({schedule.local(tick).date() for tick in year}) >= (52 if "SUN" in text else 365)
    for index in range(0, len(year) - 1, 7):
        for at in (year[index], year[index] + 1, (year[index] + year[index + 1]) / 2, year[index + 1] - 0.5):
            assert schedule.next(at) == year[index + 1], schedule.local(at)
    for most in (1, 10, 300):
        found, more = schedule.between(year[3], year[50], most)
        assert found == year[4:51][-most:] and more == (most < 47)


def test_what_it_costs_to_find_the_newest_tick_does_not_depend_on_how_long_ago_the_last_was(monkeypatch):
    schedule = cron.parsed("* * * * *", "Europe/Berlin", "latest")
    looked = []
    after = cron.Schedule.after

    def counted(self, at):
        for tick in after(self, at):
            looked.append(tick)
            yield tick

    monkeypatch.setattr(cron.Schedule, "after", counted)
    now = datetime(2026, 11, 24, tzinfo=UTC).timestamp()
    assert schedule.between(now - 60 * 86400 * 365, now, 1) == ([now], True)
    assert len(looked) <= 100


# -- what cannot be ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"schedule": "0 9 * *"}, "has 4 fields. Write five fields"),
        ({"schedule": "0 0 9 * * MON"}, "has 6 fields. Write five fields"),
        ({"schedule": "daily"}, "has 1 field."),
        ({"schedule": "@reboot"}, "has 1 field."),
        ({"schedule": ""}, "has 0 fields"),
        ({"schedule": "0 25 * * *"}, 'bad hour. Write five fields, minute hour day-of-month month day-of-week: "0 9 * * MON"'),
        ({"schedule": "0 9 * * MONDAY"}, "bad day-of-week"),
        ({"schedule": "0 9 30 2 *"}, "bad day-of-month"),
        ({"schedule": 9}, "is no text"),
        ({"schedule": timedelta(hours=1)}, "is no text"),
        ({"schedule": "0 9 * * *", "timezone": "Europe/Berln"}, "Did you mean 'Europe/Berlin'?"),
        ({"schedule": "0 9 * * *", "timezone": "Mars"}, "is not known"),
        ({"schedule": "0 9 * * *", "timezone": "../etc/passwd"}, "is not known"),
        ({"schedule": "0 9 * * *", "timezone": "Europe"}, "is not known"),
        ({"schedule": "0 9 * * *", "timezone": ""}, 'such as "Europe/Berlin"'),
        ({"schedule": "0 9 * * *", "timezone": 2}, 'such as "Europe/Berlin"'),
        ({"schedule": "0 9 * * *", "catch_up": "newest"}, "'latest', 'all', 'skip'"),
        ({"schedule": "0 9 * * *", "catch_up": None}, "'latest', 'all', 'skip'"),
        ({"timezone": "Europe/Berlin"}, "belong to a schedule"),
        ({"catch_up": "all"}, "belong to a schedule"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_where_it_is_written_with_a_right_form(options, says):
    async def flow(ctx):
        return 1

    def plain(ctx):
        return 1

    for define, fn in ((workflow, flow), (agentflow.sync.workflow, plain)):
        with pytest.raises(UsageError) as error:
            define("refused", **options)(fn)
        assert says in str(error.value)


def test_a_scheduled_workflow_takes_the_instant_of_its_tick_or_nothing():
    async def two(ctx, when, more): ...
    async def two_with_default(ctx, when, more=1): ...
    async def several(ctx, *whens): ...
    async def named(ctx, **options): ...

    for fn in (two, two_with_default, several, named):
        with pytest.raises(UsageError, match="nothing more, or one parameter that gets the instant of its tick"):
            workflow("refused", schedule="@daily")(fn)

    async def text(ctx, when: str): ...
    async def day(ctx, when: date): ...
    async def number(ctx, when: int | None): ...

    for fn in (text, day, number):
        with pytest.raises(UsageError, match="argument when does not fit"):
            workflow("refused", schedule="@daily")(fn)

    async def nothing(ctx): ...
    async def bare(ctx, when): ...
    async def moment(ctx, when: datetime): ...
    async def default(ctx, when: datetime | None = None): ...
    async def keyword(ctx, *, when: datetime): ...

    for fn, name in ((nothing, None), (bare, "when"), (moment, "when"), (default, "when"), (keyword, "when")):
        assert workflow("taken", schedule="@daily")(fn).tick_argument == name
    assert workflow(name="taken", execute=bare, schedule="@daily", timezone="Asia/Tokyo").options().schedule.timezone == "Asia/Tokyo"


# -- runs, with a clock that is moved -----------------------------------------------------------------


@pytest.fixture
def clock():
    with FakeClock(datetime(2026, 3, 27, 12, tzinfo=UTC)) as clock:
        yield clock


def once(*flows) -> None:
    worker.work(flows, once=True)


def ids() -> list[str]:
    return sorted(run.id for run in runs.list())


def reporting(name: str = "report", schedule: str = "0 9 * * *", **options):
    @workflow(name, schedule=schedule, **options)
    async def report(ctx, when: datetime) -> str:
        return await step("look", lambda: f"{when:%a %H:%M %Z}")

    return report


def test_a_month_of_ticks_is_a_run_each_with_the_instant_it_is_for(clock):
    report = reporting(timezone="Europe/Berlin", catch_up="all")
    once(report)
    assert ids() == []
    clock.advance("31d")
    once(report)
    found = runs.list()[::-1]
    assert len(found) == 31 and {run.status for run in found} == {"completed"}
    expected = [datetime(2026, 3, 28, 9, tzinfo=BERLIN) + timedelta(days=n) for n in range(31)]  # by the local clock
    assert [run.tick for run in found] == expected == [run.input for run in found]
    assert [run.id for run in found] == [f"report-{tick.astimezone(UTC):%Y%m%dT%H%M%SZ}" for tick in expected]
    assert found[0].output == "Sat 09:00 CET" and found[1].output == "Sun 09:00 CEST"
    once(report)
    assert len(runs.list()) == 31


def test_the_first_tick_is_the_first_after_a_worker_has_seen_the_schedule(clock, said):
    report = reporting(schedule="0 * * * *")
    clock.advance("90m")
    once(report)
    assert ids() == [] and "report · scheduled 0 * * * * (UTC), next tick 2026-03-27 14:00 UTC" in said()
    clock.advance("29m")
    once(report)
    assert ids() == []
    clock.advance("1m")
    once(report)
    once(report)
    assert ids() == ["report-20260327T140000Z"]
    assert "report-20260327T140000Z · begins: tick 2026-03-27 14:00 UTC of 0 * * * * (UTC)" in said()


@pytest.mark.parametrize(
    ("catch_up", "hours"), [("latest", [18]), ("all", [13, 14, 15, 16, 17, 18]), ("skip", [])]
)
def test_ticks_that_no_worker_noticed_are_caught_up_with_as_told(clock, said, catch_up, hours):
    report = reporting(schedule="0 * * * *", catch_up=catch_up)
    once(report)
    clock.advance("6h30m")
    once(report)
    assert ids() == [f"report-20260327T{hour}0000Z" for hour in hours]
    missed = {"latest": "5 ticks were missed", "skip": "6 ticks were missed"}
    assert catch_up == "all" or f"{missed[catch_up]} while no worker ran, and not run (catch_up='{catch_up}')" in said()
    clock.advance("30m")
    once(report)
    clock.advance("1h")
    once(report)  # a minute is given to the one who looks first
    clock.advance("59m")
    once(report)
    assert ids() == [f"report-20260327T{hour}0000Z" for hour in [*hours, 19, 20]]


def test_a_tick_noticed_within_a_minute_was_not_missed(clock):
    report = reporting(schedule="0 * * * *", catch_up="skip")
    once(report)
    clock.advance("1h59s")
    once(report)
    assert ids() == ["report-20260327T130000Z"]
    clock.advance("61m")
    once(report)
    assert ids() == ["report-20260327T130000Z"]


def test_very_many_missed_ticks_are_bounded_and_that_is_said(clock, said, journal):
    begun = []

    @workflow("busy", schedule="* * * * *", catch_up="all")
    async def busy(ctx, when):
        begun.append(when)

    once(busy)
    clock.advance("7d")
    once(busy)
    assert len(begun) == schedules.MOST == 1000 and begun == sorted(begun) and begun[-1] == clock.now
    assert "busy · more than 1000 ticks were missed: only the newest of them are run" in said()
    assert len(runs.list()) == 1000


def test_a_failed_run_stops_no_later_tick_and_can_be_retried(clock):
    broken = [True]

    @workflow("shaky", schedule="0 * * * *")
    async def shaky(ctx):
        await step("look", lambda: 1 / 0 if broken[0] else 1)

    once(shaky)
    for _ in range(2):
        clock.advance("1h")
        once(shaky)
    assert [run.status for run in runs.list()] == ["failed", "failed"]
    broken[0] = False
    clock.advance("1h")
    once(shaky)
    assert [run.status for run in runs.list()] == ["completed", "failed", "failed"]
    runs.get("shaky-20260327T130000Z").retry()
    once(shaky)
    assert [run.status for run in runs.list()] == ["completed", "failed", "completed"]


def test_a_tick_starts_while_the_run_before_waits(clock):
    @workflow("slow", schedule="0 * * * *")
    async def slow(ctx, when: datetime):
        await ctx.sleep("90m")

    once(slow)
    clock.advance("1h")
    once(slow)
    clock.advance("1h")
    once(slow)
    assert [run.status for run in runs.list()] == ["waiting", "waiting"]
    clock.advance("30m")
    once(slow)
    assert [run.status for run in runs.list()] == ["waiting", "completed"]


def test_a_run_started_by_hand_is_another_run(clock):
    report = reporting(schedule="0 13 * * *")
    once(report)
    clock.advance("1h")
    assert report.run_sync(clock.now) == "Fri 13:00 UTC"
    once(report)
    own, tick = sorted(runs.list(), key=lambda run: run.tick is not None)
    assert (tick.id, tick.input) == ("report-20260327T130000Z", own.input) and own.id != tick.id
    assert own.tick is None and tick.tick == clock.now


def test_plain_workflows_have_schedules_too(clock):
    @agentflow.sync.workflow("plain", schedule="0 * * * *", timezone="America/New_York")
    def plain(ctx, when):
        return agentflow.sync.step("s", lambda: str(when))

    once(plain)
    clock.advance("1h")
    once(plain)
    assert [(run.id, run.output) for run in runs.list()] == [("plain-20260327T130000Z", "2026-03-27 09:00:00-04:00")]


def test_an_edited_schedule_or_time_zone_counts_from_the_edit_on(clock, said):
    once(reporting(schedule="0 * * * *", catch_up="all"))
    clock.advance("5h30m")
    once(reporting(schedule="15 * * * *", catch_up="all"))
    assert ids() == [] and "report · its schedule was 0 * * * * (UTC) and is 15 * * * * (UTC): ticks count from now on" in said()
    clock.advance("1h")
    once(reporting(schedule="15 * * * *", timezone="Asia/Kathmandu", catch_up="all"))
    assert ids() == [] and "and is 15 * * * * (Asia/Kathmandu)" in said()
    clock.advance("2h30m")
    once(reporting(schedule="15 * * * *", timezone="Asia/Kathmandu", catch_up="all"))
    assert ids() == ["report-20260327T193000Z", "report-20260327T203000Z"]


def test_catch_up_may_be_edited_and_a_schedule_taken_away_begins_anew(clock, said, journal):
    once(reporting(schedule="0 * * * *", catch_up="skip"))
    clock.advance("3h30m")
    once(reporting(schedule="0 * * * *", catch_up="all"))
    assert len(ids()) == 3

    @workflow("report")
    async def unscheduled(ctx): ...

    once(unscheduled)
    assert "report · has no schedule any more" in said() and schedules.known(journal) == []
    clock.advance("3h")
    once(reporting(schedule="0 * * * *", catch_up="all"))
    assert len(ids()) == 3


def test_a_worker_that_is_told_another_schedule_later_leaves_its_ticks_to_the_newer(clock, journal, said):
    older = schedules.Ticker(journal, [reporting(schedule="0 * * * *")], clock.now.timestamp())
    newer = schedules.Ticker(journal, [reporting(schedule="30 * * * *")], clock.now.timestamp())
    clock.advance("3h")
    assert older.tick(clock.now.timestamp()) == 0 and "its ticks are left to that one" in said()
    assert newer.tick(clock.now.timestamp()) == 1 and ids() == ["report-20260327T143000Z"]
    assert older.tick(clock.now.timestamp() + 7200) == 0 and said().count("are left to") == 1


def test_of_two_that_notice_a_tick_at_once_one_makes_its_run(clock, journal, monkeypatch):
    report = reporting(schedule="0 * * * *", catch_up="all")
    one, other = (schedules.Ticker(journal, [report], clock.now.timestamp()) for _ in range(2))
    clock.advance("150m")
    now = clock.now.timestamp()
    real, made = journal.guarded, []

    def late(fn):
        monkeypatch.setattr(journal, "guarded", real)
        made.append(other.tick(now))  # has looked at the row after this one, and is done before it
        return real(fn)

    monkeypatch.setattr(journal, "guarded", late)
    made.append(one.tick(now))
    assert made == [2, 0] and ids() == ["report-20260327T130000Z", "report-20260327T140000Z"]


def test_workflows_whose_names_look_alike_in_an_id_have_runs_of_their_own(clock):
    flows = [reporting(name) for name in ("a report", "a-report")]
    once(*flows)
    clock.advance("1d")
    once(*flows)
    found = runs.list()
    assert {run.workflow for run in found} == {"a report", "a-report"} and len({run.id for run in found}) == 2
    assert all(run.id.startswith("a-report-20260328T090000Z") for run in found)
    once(*flows)
    assert len(runs.list()) == 2


def test_a_look_costs_no_access_to_the_journal_until_the_next_tick(clock, journal, monkeypatch):
    ticker = schedules.Ticker(journal, [reporting(schedule="0 * * * *")], clock.now.timestamp())
    clock.advance("1h")
    assert ticker.tick(clock.now.timestamp()) == 1
    for name in ("get", "scan", "keys", "guarded", "commit"):
        monkeypatch.setattr(journal, name, lambda *_, **__: pytest.fail("looked into the journal"))
    assert ticker.tick(clock.now.timestamp() + 3599) == 0


def test_a_tick_costs_the_same_however_many_were_before(clock, journal, monkeypatch):
    ticker = schedules.Ticker(journal, [reporting(schedule="0 * * * *")], clock.now.timestamp())
    reads = []
    get = journal._reads.get
    monkeypatch.setattr(journal._reads, "get", lambda key: reads.append(key) or get(key))
    costs = []
    for _ in range(50):
        clock.advance("1h")
        reads.clear()
        assert ticker.tick(clock.now.timestamp()) == 1
        costs.append(len(reads))
    assert set(costs) == {costs[0]}


def test_doctor_knows_schedules_their_next_and_last_tick(clock, journal, capsys):
    def doctor() -> list[dict[str, object]]:
        capsys.readouterr()
        command(["doctor", "--json"])
        return [each for each in orjson.loads(capsys.readouterr().out) if each["check"] == "schedule"]

    assert doctor() == []
    report = reporting(timezone="Europe/Berlin")
    once(report)
    (only,) = doctor()
    assert only["detail"] == (
        "report: 0 9 * * * (Europe/Berlin), next tick 2026-03-28 09:00 CET, no tick yet; no worker runs it"
    )
    assert only["ok"] is None
    clock.advance("1d")
    once(report)
    (only,) = doctor()
    assert "next tick 2026-03-29 09:00 CEST, last tick 2026-03-28 09:00 CET (report-20260328T080000Z, completed)" in only["detail"]
    settings.clock = None  # documents of runs carry real times
    runs.purge(older_than=0)
    assert "(report-20260328T080000Z, purged)" in doctor()[0]["detail"]


def test_a_runs_tick_is_shown(clock, capsys):
    report = reporting()
    once(report)
    clock.advance("1d")
    once(report)
    capsys.readouterr()
    assert command(["runs", "show", "report-20260328T090000Z", "--json"]) == 0
    assert orjson.loads(capsys.readouterr().out)["tick"] == "2026-03-28T09:00:00+00:00"
    assert command(["runs", "show", "report-20260328T090000Z"]) == 0 and "\ntick " in capsys.readouterr().out


async def test_a_worker_that_stays_begins_a_tick_when_it_comes(clock, journal):
    begun = asyncio.Event()

    @workflow("awaited", schedule="0 * * * *")
    async def awaited(ctx, when: datetime):
        begun.set()

    staying = worker.Worker({"awaited": awaited})
    task = asyncio.ensure_future(staying.run())
    while not schedules.known(journal):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    clock.advance("1h")
    await begun.wait()
    staying.stop()
    await task
    assert ids() == ["awaited-20260327T130000Z"]


# -- real workers, killed --------------------------------------------------------------------------------

APP = """
    import time
    from agentflow import schedules, store
    from agentflow.settings import settings

    # The clock of all workers is a file, which the test moves.
    settings.clock = lambda: float((HERE / "clock.txt").read_text())

    @workflow("minutely", schedule="* * * * *", catch_up="all")
    async def minutely(ctx, when):
        await step("begin", note, f"begin {when:%H:%M}")
        await step("end", note, f"end {when:%H:%M}")

    def dies(*_):
        die()

    if os.environ.get("DIE") == "inside":
        put = store.FileTxn.put
        store.FileTxn.put = lambda txn, key, value: die() if key.startswith("sc/") and "2026" in value else put(txn, key, value)
    if os.environ.get("DIE") == "after":
        schedules.log.info = dies  # the first line after the runs are made
        schedules.Ticker.lines = lambda self: ()
"""
START = datetime(2026, 5, 1, 8, 0, 30, tzinfo=UTC).timestamp()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_program(APP, tmp_path, "app.py")
    move(tmp_path, START)
    return tmp_path


def move(folder: Path, to: float) -> None:
    (folder / "clock.new").write_text(str(to))
    os.replace(folder / "clock.new", folder / "clock.txt")


def start(folder: Path, *args: str, **env: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "agentflow", "worker", "app.py", *args],
        cwd=folder, env=environment(folder, env), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    running.append(process)
    return process


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    return err


def tick_id(minute: int) -> str:
    return f"minutely-20260501T08{minute:02}00Z"


def wait_for(what, *processes: subprocess.Popen[str]) -> None:
    while not what():
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def enrolled(process: subprocess.Popen[str], journal) -> bool:
    return any(each["pid"] == process.pid for each in worker.enrolled(journal))


def test_two_workers_one_killed_around_each_tick_run_every_tick_exactly_once(folder, journal):
    crew = [start(folder), start(folder)]
    wait_for(lambda: all(enrolled(each, journal) for each in crew) and schedules.known(journal), *crew)
    minutes = range(1, 7)
    for minute in minutes:
        move(folder, START + 60 * minute - 30)
        # As soon as the run is there, whoever made it: it has not begun, is going on, or has just ended.
        wait_for(lambda: tick_id(minute) in ids(), *crew)
        victim = crew.pop(0)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        crew.append(start(folder))
        wait_for(lambda: enrolled(crew[-1], journal), *crew)
    wait_for(lambda: {run.status for run in runs.list()} == {"completed"}, *crew)
    for each in crew:
        each.send_signal(signal.SIGTERM)
        ended(each)
    assert ids() == [tick_id(minute) for minute in minutes]
    for run in runs.list():
        assert [each.name for each in run.steps] == ["begin", "end"]
    assert set(notes(folder)) == {f"{word} 08:{minute:02}" for word in ("begin", "end") for minute in minutes}


@pytest.mark.parametrize("when", ["inside", "after"])
def test_a_worker_killed_while_it_makes_the_runs_of_ticks_leaves_all_or_none(folder, journal, when):
    ended(start(folder, "--once"))
    move(folder, START + 119)
    ended(start(folder, "--once", DIE=when), -signal.SIGKILL)
    assert ids() == ([] if when == "inside" else [tick_id(1), tick_id(2)])
    assert notes(folder) == []
    ended(start(folder, "--once"))
    assert ids() == [tick_id(1), tick_id(2)] and {run.status for run in runs.list()} == {"completed"}
    assert sorted(notes(folder)) == ["begin 08:01", "begin 08:02", "end 08:01", "end 08:02"]


def test_the_worker_says_what_is_scheduled(folder):
    assert "minutely · scheduled * * * * * (UTC), next tick 2026-05-01 08:01 UTC" in ended(start(folder, "--once"))
