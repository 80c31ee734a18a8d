"""Scripted events beside scripted people, under a clock that a test moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentflow import Context, UsageError, Waiting, human_task, parallel, runs, step, workflow
from agentflow import sync as blocking
from agentflow.testing import FakeClock, FakePeople, Reject, crash_points, event
from tests.outside import Project


@workflow("ship")
async def ship(ctx: Context, number: int) -> list[Any]:
    begin = ctx.now("begin")
    paid = await ctx.wait_for_event("paid", match={"order": number}, timeout="14d", default=None)
    if paid is None:
        return ["remind", (ctx.now("end") - begin).days]
    decision = await human_task("approve", assign_to="manager", data=paid)
    packed = await ctx.wait_for_event("packed")
    return [bool(decision), decision.comment, packed, (ctx.now("end") - begin).days]


def test_an_event_comes_when_a_run_waits_for_it_and_people_answer_in_between() -> None:
    with FakePeople({"manager": Reject("too dear")}, events={"packed": 3, "paid": {"order": 7}}) as people:
        assert people.run(ship, 7) == [False, "too dear", 3, 0]
    assert [one.name for one in people.sent] == ["packed", "paid"] and len(people.decided) == 1


def test_an_event_that_comes_later_moves_the_clock_and_one_that_is_too_late_is_told() -> None:
    with FakeClock(), FakePeople({"": True}, events=[event("paid", {"order": 7}, after="3d"), event("packed", after="2d")]) as people:
        assert people.run(ship, 7) == [True, None, None, 5]
    with FakeClock(), pytest.raises(AssertionError, match=r"nobody waited for it: event\('paid'"):
        with FakePeople(events=[event("paid", {"order": 8}, after="20d")]) as people:
            assert people.run(ship, 8) == ["remind", 14]


def test_thirty_days_between_events_take_no_time_and_those_of_one_name_come_in_order() -> None:
    @workflow("monthly")
    async def monthly(ctx: Context) -> tuple[list[int], int]:
        begin = ctx.now("begin")
        found = [await ctx.wait_for_event("month") for _ in range(12)]
        return found, (ctx.now("end") - begin).days

    with FakeClock(), FakePeople(events=[event("month", n, after="30d") for n in range(12)]) as people:
        assert people.run(monthly) == (list(range(12)), 360)


def test_events_reach_branches_and_children_by_what_they_match() -> None:
    @workflow("part")
    async def part(ctx: Context, number: int) -> int:
        return int((await ctx.wait_for_event("done", match={"part": number}))["at"])

    @workflow("whole")
    async def whole(ctx: Context) -> list[int]:
        return await parallel([part.run(number) for number in range(3)])

    script = [event("done", {"part": number, "at": number * 10}) for number in (2, 0, 1)]
    with FakePeople(events=script) as people:
        assert people.run(whole) == [0, 10, 20]


def test_plain_code_gets_events_too() -> None:
    @blocking.workflow("plain")
    def plain(ctx: Any) -> Any:
        return ctx.wait_for_event("go")

    with FakePeople(events={"go": "now"}) as people:
        assert people.run(plain) == "now"


async def test_coroutines_get_events_too() -> None:
    with FakePeople({"": True}, events={"paid": {"order": 7}, "packed": 1}) as people:
        assert (await people.arun(ship, 7))[2] == 1


def test_an_event_that_nobody_waits_for_or_that_does_not_match_fails_and_is_named() -> None:
    with pytest.raises(AssertionError, match=r"1 of its events(.|\n)*nobody waited for it: event\('refunded'"):
        with FakePeople({"": True}, events={"paid": {"order": 7}, "packed": 1, "refunded": 2}) as people:
            people.run(ship, 7)
    people = FakePeople(events={"paid": {"order": 9}})
    with FakeClock():
        assert people.run(ship, 10)[0] == "remind"
        with pytest.raises(AssertionError, match=r"it came, and no wait took it(.|\n)*'order': 9"):
            people.check()


def test_an_event_that_is_not_scripted_leaves_the_run_waiting() -> None:
    people = FakePeople({"": True}, events={"paid": {"order": 7}})
    with pytest.raises(Waiting, match="packed"):
        people.run(ship, 7)
    assert runs.list()[0].status == "waiting"
    people.check()


def test_one_script_serves_several_people_and_wrong_scripts_are_refused() -> None:
    script = [event("go", 1)]

    @workflow("goes")
    async def goes(ctx: Context, n: int) -> int:
        return int(await ctx.wait_for_event("go"))

    for n in range(2):
        with FakePeople(events=script) as people:
            assert people.run(goes, n) == 1
    for wrong in ("paid", [("paid", 1)], [1]):
        with pytest.raises(UsageError, match="event"):
            FakePeople({}, events=wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="has a name"):
        event(" ")
    with pytest.raises(UsageError, match="FakeClock"):
        FakePeople(events=[event("go", after="1d")]).run(goes, 9)


def test_crash_points_are_survived_with_people_and_events() -> None:
    @workflow("crashing")
    async def crashing(ctx: Context) -> str:
        number = await ctx.wait_for_event("paid")
        decision = await human_task("approve", data=number)
        return await step("ship", lambda: f"ship {number} {decision.by}")

    with FakePeople({"": True}, events={"paid": 7}, by="grace") as people:
        assert crash_points(crashing, people=people).value == "ship 7 grace"


def test_the_fixture_fails_a_test_whose_events_were_not_received(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write(
        "test_app.py",
        """
        from agentflow import workflow
        from agentflow.testing import event

        @workflow
        async def order(ctx, number: int):
            return await ctx.wait_for_event("paid", timeout="14d", default="late")

        def test_paid(fake_people, fake_clock):
            assert fake_people(events={"paid": 30}).run(order, 1) == 30

        def test_late(fake_people, fake_clock):
            assert fake_people(events=[event("paid", 30, after="15d")]).run(order, 1) == "late"
        """,
    )
    done = project.pytest()
    assert (done.code, done.passed, done.errors) == (1, 2, 1), done
    assert "nobody waited for it: event('paid', '30', after='15d')" in done.text, done
