"""What the page asks for, in JSON. Ids are in the query: a run's id may hold any character.

Every function here runs in a thread of its own and reads through its own connection: nobody's commits are waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import agentflow
from agentflow import costlines, errors, rundocs, shapes, tasks
from agentflow.handles import Run
from agentflow.journal import Journal, Place
from agentflow.records import moment
from agentflow.scratch import open_journal
from agentflow.settings import now
from agentflow.shown import clean, shown
from agentflow.store import DB_NAME
from agentflow.ui import board, detail, inbox, live

STATIC = Path(__file__).parent / "static"
WAYS = ("approve", "reject", "answer")
MOST_RUNS = 200
MOST_LOOKED_AT = 5_000  # documents, for one page of runs of a certain workflow

# The first that fits.
_STATUS = (
    ((errors.RunNotFound, errors.TaskNotFound), 404),
    (errors.TaskClosed, 409),
    (errors.UsageError, 422),
    (errors.JournalError, 503),
)


class Routes:
    """The routes over one journal.

    Args:
        place: its directory, or the URL of its database.
        stopped: whether the server is about to end.
    """

    def __init__(self, place: Place, stopped: Callable[[], bool]) -> None:
        self._place = place
        self._stopped = stopped

    def app(self) -> Starlette:
        """All of it as one application."""
        routes = [
            Route("/", self.page),
            Mount("/static", StaticFiles(directory=STATIC)),
            Route("/api/about", self.about),
            Route("/api/runs", self.runs),
            Route("/api/run", self.run),
            Route("/api/step", self.step),
            Route("/api/value", self.value),
            Route("/api/tasks", self.tasks),
            Route("/api/task", self.task),
            Route("/api/costs", self.costs),
            Route("/api/events", self.events),
            *(Route(f"/api/task/{how}", self._deciding(how), methods=["POST"]) for how in WAYS),
        ]
        return Starlette(routes=routes, exception_handlers={errors.AgentflowError: _failed})

    def journal(self) -> Journal:
        """The journal, unless it is gone: looking at it must not make another one."""
        if isinstance(self._place, Path) and not (self._place / DB_NAME).exists():
            raise errors.JournalIncomplete(f"the journal {self._place} is not there any more.")
        return open_journal()

    def page(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    def about(self, request: Request) -> Response:
        """The journal, the version, how many tasks are open."""
        journal = self.journal()
        open_ = sum(1 for _ in journal.keys("xt/open/"))
        return _json({"journal": str(self._place), "version": agentflow.__version__, "open_tasks": open_})

    def runs(self, request: Request) -> Response:
        """Runs as in ``runs list --json``: ``status, workflow, limit, before`` (the last answer's ``next``)."""
        wanted = request.query_params.get
        workflow, limit = wanted("workflow") or None, min(_number(wanted("limit"), "limit", 50), MOST_RUNS)
        journal = self.journal()
        found: list[Any] = []
        last, looked = None, 0
        status, before = wanted("status") or None, wanted("before") or None
        for place, document in rundocs.newest(journal, status=status, before=before):
            if len(found) == limit or looked == MOST_LOOKED_AT:
                break
            last, looked = place, looked + 1
            if document is not None and (workflow is None or workflow.lower() in document["workflow"].lower()):
                found.append(shapes.summary(Run(journal, document)))
        else:
            last = None
        return _json({"runs": shown(found), "next": last, "looked_at": looked})

    def run(self, request: Request) -> Response:
        """One run with its steps: ``id``, ``first`` (number of the first step)."""
        journal, first = self.journal(), request.query_params.get("first")
        document = rundocs.find(journal, request.query_params.get("id", ""))
        made = board.run(journal, document, None if first is None else _number(first, "first", 0))
        return _json(made | {"tasks": inbox.listed(journal, "all", document["id"], None)["tasks"], "at": _now()})

    def step(self, request: Request) -> Response:
        """One step: ``run``, ``id``."""
        journal = self.journal()
        document = rundocs.find(journal, request.query_params.get("run", ""))
        return _json(detail.step(journal, document, request.query_params.get("id", "")) | {"at": _now()})

    def value(self, request: Request) -> Response:
        """One value in full, as text: ``run``, ``step`` (none: the run's own), ``name``; or ``task``, ``name``."""
        journal, wanted = self.journal(), request.query_params.get
        if (task_id := wanted("task")) is not None:
            return PlainTextResponse(inbox.in_full(tasks.get(task_id), wanted("name") or "data"))
        document = rundocs.find(journal, wanted("run") or "")
        return PlainTextResponse(detail.text(journal, document, wanted("step"), wanted("name") or ""))

    def tasks(self, request: Request) -> Response:
        """Tasks as in ``tasks list --json``: ``status`` (open or all), ``run``, ``for``."""
        wanted = request.query_params.get
        found = inbox.listed(self.journal(), wanted("status") or "open", wanted("run") or None, wanted("for") or None)
        return _json(found | {"at": _now()})

    def task(self, request: Request) -> Response:
        """One task: ``id``."""
        self.journal()
        return _json(inbox.shown(tasks.get(request.query_params.get("id", ""))) | {"at": _now()})

    def costs(self, request: Request) -> Response:
        """What calls came to, ``lines`` as in ``cost --json``: ``by`` (model, workflow, step, day)."""
        by = request.query_params.get("by") or "model"
        lines = costlines.summary(self.journal(), by)
        total = shapes.cost(costlines.total(lines), "model")
        return _json({"by": by, "lines": shown([shapes.cost(line, by) for line in lines]), "total": shown(total)})

    async def events(self, request: Request) -> Response:
        """Server-sent events, see ``live.py``: ``run``."""
        told = live.changes(self.journal, request.query_params.get("run"), self._stopped)
        return StreamingResponse(told, media_type="text/event-stream")

    def _deciding(self, how: str) -> Callable[[Request], Any]:
        async def decide(request: Request) -> Response:
            return await run_in_threadpool(self._decided, how, await request.body())

        return decide

    def _decided(self, how: str, body: bytes) -> Response:
        """The decision in the body: ``id, by, comment``, for an answer ``data``. Gives the task, and who goes on."""
        try:
            given = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise errors.UsageError(f"the body is not JSON: {error}") from None
        if not isinstance(given, dict) or not isinstance(given.get("id"), str):
            raise errors.UsageError('the body has to be an object with "id", the task\'s.')
        journal = self.journal()
        task = inbox.decide(given["id"], how, given)
        return _json({"task": inbox.shown(task), "goes_on": shown(inbox.goes_on(journal, task))})


def _failed(request: Request, error: Exception) -> Response:
    """What agentflow refuses, in words; of a task that was closed before, how it was."""
    status = next((status for kinds, status in _STATUS if isinstance(error, kinds)), 400)
    made: dict[str, Any] = {"error": clean(str(shown(str(error)))), "type": type(error).__name__}
    if isinstance(error, errors.TaskClosed) and error.task_id:
        made["task"] = inbox.shown(tasks.get(error.task_id))
    return _json(made, status)


def _json(tree: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(tree), status, media_type="application/json")


def _now() -> Any:
    return shown(moment(now()))


def _number(text: str | None, what: str, default: int) -> int:
    if text is None:
        return default
    if not text.isdecimal():
        raise errors.UsageError(f"{what}={text!r} is not a whole number.")
    return int(text)
