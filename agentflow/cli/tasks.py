"""``agentflow tasks``: what people are asked, and their answers."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
import typer

from agentflow import shapes, tasks
from agentflow.cli import output
from agentflow.errors import TaskNotFound
from agentflow.records import HumanTask

app = typer.Typer(help="What people are asked, and their answers.", no_args_is_help=True, rich_markup_mode=None)
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TASK = Annotated[str, typer.Argument(metavar="TASK", help="The task's id, or enough of its beginning.")]
BY = Annotated[str | None, typer.Option("--by", help="Who decides; kept with the decision.")]
COMMENT = Annotated[str | None, typer.Option("--comment", help="Kept with the decision.")]


@app.command("list")
def list_(
    status: Annotated[
        str | None, typer.Option(help="open, approved, rejected, answered, expired or withdrawn.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Decided ones too.")] = False,
    run: Annotated[str | None, typer.Option(help="Only tasks of this run.")] = None,
    for_: Annotated[str | None, typer.Option("--for", help="Only tasks for this person.")] = None,
    json: JSON = False,
) -> None:
    """Open tasks, oldest first."""
    wanted = status or (None if all_ else "open")
    found = tasks.list(status=wanted, run_id=run, assign_to=for_) if output.has_journal() else []
    if json:
        return output.data([shapes.task(task) for task in found])
    if not found:
        return output.words("No tasks." if all_ else f"No {wanted} tasks.")
    output.table(
        ("task", "status", "for", "what", "run", "since"),
        ((t.id, t.status, _who(t), t.title or t.type, t.run_id, output.when(t.created_at)) for t in found),
    )


@app.command()
def show(task_id: TASK, json: JSON = False) -> None:
    """One task: what the person is shown, and the decision."""
    _needed(task_id)
    task = tasks.get(task_id)
    if json:
        return output.data(shapes.task(task))
    decision = task.decision
    output.fields(
        (
            ("task", task.id),
            ("asks", task.title or task.type),
            ("for", _who(task)),
            ("status", task.status),
            ("run", task.run_id),
            ("since", output.when(task.created_at)),
            ("until", output.when(task.deadline)),
            ("data", output.json_text(task.data, indent=True)),
            ("form", output.json_text((task.schema or {}).get("properties")) if task.schema else None),
            ("digest", task.digest),
            ("answer", output.json_text(decision.data) if decision and decision.data is not None else None),
            *(
                ("refused", f"{output.json_text(each['data'])} by {each['by'] or 'somebody'}: {each['why']}")
                for each in task.extra["refused"]
            ),
        )
    )
    output.console().print()
    output.table(("when", "what", "by", "remark"), map(_line, task.trail))


def _line(entry: dict[str, Any]) -> tuple[Any, ...]:
    """One line of the trail: who did what, with the comment or whom it went to."""
    who = entry.get("assign_to")
    to = f"for {who if isinstance(who, str) else ', '.join(who)}" if who else None
    return output.when(entry["at"]), entry["what"], entry.get("by"), entry.get("comment") or entry.get("why") or to


@app.command()
def approve(task_id: TASK, by: BY = None, comment: COMMENT = None, json: JSON = False) -> None:
    """Approve exactly what the task shows."""
    _needed(task_id)
    _decided(tasks.approve(task_id, by=by, comment=comment), json)


@app.command()
def reject(task_id: TASK, by: BY = None, comment: COMMENT = None, json: JSON = False) -> None:
    """Reject what the task shows."""
    _needed(task_id)
    _decided(tasks.reject(task_id, by=by, comment=comment), json)


@app.command()
def answer(
    task_id: TASK,
    data: Annotated[str, typer.Argument(metavar="JSON", help="The answer, such as '{\"amount\": 30}'.")],
    by: BY = None,
    comment: COMMENT = None,
    json: JSON = False,
) -> None:
    """Answer a task that asks for data."""
    _needed(task_id)
    try:
        given = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise typer.BadParameter(f"the answer is not JSON: {error}") from None
    _decided(tasks.answer(task_id, given, by=by, comment=comment), json)


def _needed(task_id: str) -> None:
    if not output.has_journal():
        raise TaskNotFound(f"no task {task_id!r}.")


def _decided(task: HumanTask, json: bool) -> None:
    if json:
        output.data(shapes.task(task))
    else:
        output.console().print(output.cell(f"{task.id} {task.status}"))
    output.words(f"Run {task.run_id} goes on when its program runs again.")


def _who(task: HumanTask) -> str:
    names = [task.assign_to] if isinstance(task.assign_to, str) else task.assign_to
    return ", ".join(names or ()) or "anybody"
