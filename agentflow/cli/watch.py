"""``agentflow runs watch``: one line for each step that ends and each change of a run's status."""

from __future__ import annotations

import sys
import time
from typing import Any

from agentflow import runs, shapes
from agentflow.cli import output
from agentflow.durations import words
from agentflow.handles import Run
from agentflow.records import StepRecord, moment, money
from agentflow.scratch import open_journal

ENDED = ("completed", "failed", "cancelled")
PAUSE = 0.1
LOOK = 2.0  # seconds after which a run is looked at though nobody has committed: its process may have died


def follow(run: Run | None, json: bool) -> None:
    """Tell what happens until the run has ended; with None, of all runs and without end."""
    watcher = _Watcher(run.id if run is not None else None, json)
    journal = open_journal()
    while True:
        version, looked = journal.version(), time.monotonic()
        if watcher.look():
            return
        while journal.version() == version and time.monotonic() - looked < LOOK:
            time.sleep(PAUSE)


class _Watcher:
    def __init__(self, run_id: str | None, json: bool) -> None:
        self.run_id = run_id
        self.json = json
        self.status: dict[str, str] = {}
        self.steps: set[tuple[str, Any]] = set()
        self.first = True

    def look(self) -> bool:
        """Tell what is new; whether the one run that is followed has ended."""
        found = runs.list()[::-1] if self.run_id is None else [runs.get(self.run_id)]
        for run in found:
            before = self.status.get(run.id)
            # What ran before all runs were followed is no news.
            news = self.run_id is not None or not (self.first and run.status in ENDED)
            if before == run.status and run.status in ENDED:
                continue
            self._steps(run, news)
            if before != run.status:
                self.status[run.id] = run.status
                if news:
                    self._status(run)
        self.first = False
        sys.stdout.flush()
        return self.run_id is not None and self.status[self.run_id] in ENDED

    def _steps(self, run: Run, news: bool) -> None:
        for step in run.steps if news else ():
            known = (run.id + step.id, step.completed_at)
            if known in self.steps or step.kind == "value":
                continue
            self.steps.add(known)
            if self.json:
                facts = ("name", "id", "kind", "status", "attempts", "duration", "completed_at", "error")
                cost = {"cost": shapes.dollars(step.cost)}
                _line({"event": "step", "run": run.id} | {name: getattr(step, name) for name in facts} | cost)
            else:
                output.console().print(output.cell(self._step_line(run, step)), soft_wrap=True)

    def _step_line(self, run: Run, step: StepRecord) -> str:
        facts = [output.when(step.completed_at), "  " if step.parent else "", step.name, step.status]
        if step.duration is not None and step.duration >= 0.001:
            facts.append(words(step.duration))
        if step.cost:
            facts.append(money(step.cost))
        if self.run_id is None:
            facts.insert(1, run.id)
        return "  ".join(fact for fact in facts if fact)

    def _status(self, run: Run) -> None:
        if self.json:
            return _line(
                {"event": "status", "run": run.id, "status": run.status, "error": run.error}
                | {"waiting_on": run.waiting_on, "cost": shapes.dollars(run.cost)}
            )
        line = output.cell(f"{run.id} {run.status}", output.STYLES.get(run.status, ""))
        output.console().print(line, soft_wrap=True)
        for text in [*map(waits, run.waiting_on), *([run.error] if run.error else ())]:
            output.console().print(output.cell(f"  {text}"), soft_wrap=True)


def _line(event: dict[str, Any]) -> None:
    sys.stdout.write(output.json_text(event) + "\n")


def waits(wait: dict[str, Any]) -> str:
    """What a run waits for, and the command that answers."""
    if wait["kind"] == "task":
        answer = wait.get("command") or f"agentflow tasks approve {wait['id']}"
        return f"{wait['title'] or wait['type']}: {answer}"
    if wait["kind"] == "batch":
        return f"batch {wait['id']}: {wait['requests']} requests to {wait['model']}, {wait['status']}"
    if "command" in wait:
        return f"{wait['kind']} {wait['name']}: {wait['command']}"
    return f"{wait['kind']} until {output.when(moment(wait['until']))}" if wait.get("until") else str(wait["kind"])
