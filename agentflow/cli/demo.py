"""``agentflow demo``: starts the order workflow, kills it, starts it again, answers for the manager, and tells."""

from __future__ import annotations

import json as json_
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

import agentflow
from agentflow import runs, shapes, tasks
from agentflow.cli import output
from agentflow.errors import AgentflowError
from agentflow.journal import Place, PostgresURL
from agentflow.providers import resolve
from agentflow.records import HumanTask, money
from agentflow.scratch import open_journal

WIDTH = 78
WORKFLOW = "process-order"
_SUMMARY = re.compile(
    r"(?P<run>\S+) · (?P<status>.+?) · \d+ steps?: (?P<replayed>\d+) replayed, (?P<ran>\d+) run(?P<doubt>, [^·]+)?"
    r"( · paid (?P<paid>\$[\d.]+)[^,]*, saved (?P<saved>\$[\d.]+))?"
)
Say = Callable[..., None]


def demo(
    live: Annotated[bool, typer.Option("--live", help="Ask the configured real model; this costs money.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON; the story goes to stderr.")] = False,
) -> None:
    """Process a file of orders, be killed half-way, resume, wait for a person, complete.

    Needs no key, no account and no network: a scripted model answers below the real SDK.
    """
    console = output.console(stderr=json)

    def say(text: str = "", style: str = "", indent: str = "") -> None:
        for part in text.splitlines() or [""]:
            lines = [indent + part] if len(indent + part) <= WIDTH else _wrapped(part, indent)
            for line in map(output.clean, lines):
                console.print(Text(line, style=style))

    if live:
        resolve(None)  # no model: an error before anything starts
    with tempfile.TemporaryDirectory(prefix="agentflow-demo-") as folder:
        outcome = _Story(say, Path(folder) / "book", live).tell()
    if json:
        output.data(outcome)


class _Story:
    def __init__(self, say: Say, book: Path, live: bool) -> None:
        self.say = say
        self.book = book
        self.live = live
        self.journal = open_journal().path
        self.batch = _next_batch()
        self.replayed = 0

    def tell(self) -> dict[str, Any]:
        say = self.say
        count = len(json_.loads((Path(agentflow.__file__).parent / "demo" / "orders.json").read_text("utf-8")))
        say(f"agentflow demo · {count} orders: validate, charge, assess (AI), approve, ship", "bold")
        asked = "your configured model" if self.live else "scripted; no key, no network, invented prices"
        say(f"Model: {asked}\nJournal: {self.journal}", "dim")

        half = f"demo-{self.batch}{count // 2 + 1:02d}"
        say()
        say("1  A first process works through the orders.", "bold")
        code = self._process(killed_at=half)
        if code != -signal.SIGKILL:
            raise AgentflowError(f"the demo's process was to be killed and ended with {code}; see above.")
        say(f"Killed with SIGKILL while shipping {half}, which is charged and assessed.", "red", "   ")

        say()
        say("2  A second process does the same from the beginning.", "bold")
        self._checked()
        charges = self._count("charge")
        say(f"What was finished was replayed: {charges} charges for {count} orders.", "green", "   ")

        say()
        say("3  What waits for a person keeps no process running.", "bold")
        waiting = [task for task in tasks.list() if task.run_id.startswith(f"demo-{self.batch}")]
        suspect = _suspect(waiting)
        for task in waiting:
            self._decide(task, approved=task is not suspect)

        say()
        say("4  A third process finds the answers and completes.", "bold")
        self._checked()

        say()
        return self._end(count)

    def _process(self, killed_at: str = "") -> int:
        """One process over all orders; what it says is shown as it comes."""
        package = str(Path(agentflow.__file__).parent.parent)
        environment = os.environ | {
            "AGENTFLOW_PATH": self.journal.whole if isinstance(self.journal, PostgresURL) else str(self.journal),
            "AGENTFLOW_DEMO_BOOK": str(self.book),
            "AGENTFLOW_DEMO_KILL": killed_at,
            "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
            "PYTHONIOENCODING": "utf-8",
        }
        command = [sys.executable, "-P", "-m", "agentflow.demo.worker", str(self.batch)]
        child = subprocess.Popen(
            [*command, "--live"] if self.live else command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        try:
            assert child.stdout is not None
            for line in child.stdout:
                found = _SUMMARY.fullmatch(line.rstrip("\n"))
                self.replayed += int(found["replayed"]) if found else 0
                self.say(_row(found) if found else line.rstrip("\n"), "" if found else "dim", "   ")
        except BaseException:
            child.kill()
            raise
        finally:
            child.wait()
        return child.returncode

    def _checked(self) -> None:
        if code := self._process():
            raise AgentflowError(f"the demo's process ended with {code}; see above.")

    def _decide(self, task: HumanTask, *, approved: bool) -> None:
        shown = task.data if isinstance(task.data, dict) else {"data": task.data}
        self.say(f"{task.title} ({task.id}, for {task.assign_to})", "yellow", "   ")
        self.say(" · ".join(output.json_text(value).strip('"') for value in shown.values()), "", "     ")
        if approved:
            words = ["approve", task.id, "--by", "the manager"]
            tasks.approve(task.id, by="the manager")
        else:
            words = ["reject", task.id, "--by", "the manager", "--comment", "looks like fraud"]
            tasks.reject(task.id, by="the manager", comment="looks like fraud")
        self.say(f"$ agentflow tasks {shlex.join(words)}", "cyan", "     ")

    def _count(self, what: str) -> int:
        return sum(line.split()[0] == what for line in self.book.read_text().splitlines())

    def _end(self, count: int) -> dict[str, Any]:
        done = [run for run in runs.list(workflow=WORKFLOW) if run.id.startswith(f"demo-{self.batch}")][::-1]
        outcome = {
            "runs": [run.id for run in done],
            "orders": count,
            "shipped": self._count("ship"),
            "refunded": self._count("refund"),
            "charges": self._count("charge"),
            "model_calls": sum(step.kind == "ai" for run in done for step in run.steps),
            "steps": sum(len(run.steps) for run in done),
            "replayed": self.replayed,
            "paid": shapes.dollars(_sum(run.cost for run in done)),
            "saved": shapes.dollars(_sum(run.saved for run in done)),
        }
        refunded = next((run.id for run in done if run.status == "failed"), done[-1].id)
        path = "" if _found_by_itself(self.journal) else f"AGENTFLOW_PATH={shlex.quote(str(self.journal))} "
        self.say("To look at what is left in the journal:")
        for command in ("runs list", f"runs show {refunded}", "tasks list --all"):
            self.say(f"$ {path}agentflow {command}", "cyan", "   ")
        self.say()
        self.say(
            f"{count} orders: {outcome['shipped']} shipped, {outcome['refunded']} refunded; "
            f"{outcome['charges']} charges in 3 processes, one killed."
        )
        self.say(
            f"{outcome['steps']} steps run once · {self.replayed} replayed · "
            f"paid {money(_sum(run.cost for run in done))}, saved {money(_sum(run.saved for run in done))}",
            "bold green",
        )
        return outcome


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent + "    ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _row(summary: re.Match[str]) -> str:
    """The line with which a run ends, in columns and without what is zero."""
    counted = (("replayed", "replayed"), ("ran", "run"))
    steps = [f"{summary[name]} {word}" for name, word in counted if summary[name] != "0"]
    amounts = [f"{name} {summary[name]}" for name in ("paid", "saved") if summary[name] and summary[name].strip("$0.")]
    status = summary["status"].partition(", 2")[0]
    return f"{summary['run']}  {status:<27}  {', '.join(steps):<18}  {', '.join(amounts)}".rstrip()


def _next_batch() -> int:
    """A number no earlier demo of this journal used: an order that was charged once is never charged again."""
    used = [re.fullmatch(r"demo-(\d+)\d\d", run.id) for run in runs.list(workflow=WORKFLOW)]
    return max((int(match[1]) for match in used if match), default=0) + 1


def _suspect(waiting: list[HumanTask]) -> HumanTask | None:
    """The task that the manager will reject: the order with the largest total."""
    return max(waiting, key=lambda task: Decimal(str(task.data["total"])), default=None)


def _found_by_itself(journal: Place) -> bool:
    """Whether the next command here looks into the same journal."""
    from agentflow.layout import default_path

    return default_path(Path.cwd()) == journal


def _sum(amounts: Any) -> Decimal:
    return sum(amounts, Decimal(0))
