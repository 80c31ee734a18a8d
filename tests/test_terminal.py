"""People are asked in the terminal that a run with ``wait=True`` was started from, and nowhere else."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from agentflow import configure, runs, tasks, terminal
from tests.programs import environment, notes, running, write_program

APP = """
    import time
    import agentflow.sync
    from pydantic import BaseModel, Field, field_validator

    SECRET = "sk-proj-abcdefghijklmnopqrstuvwxyz0123456789"

    class Refund(BaseModel):
        amount: int = Field(ge=1)
        reason: str
        urgent: bool = False
        tags: list[str] = []

        @field_validator("reason")
        @classmethod
        def known(cls, value):
            if value == "none":
                raise ValueError("a reason is needed")
            return value

    def told(decision):
        note(f"{decision.approved} {decision.by} {decision.comment} {decision.data!r}")

    @workflow("expenses")
    async def expenses(ctx, words: str):
        data = {"who": "Ada", "amount": 120, "key": SECRET, "text": words, "lines": [{"a": 1, "b": None}, "x"], "\\x1b[2J": "\\x1b[31m"}
        told(await human_task("approve", "manager", data, title="Pay this?"))

    @agentflow.sync.workflow("plain")
    def plain(ctx):
        told(agentflow.sync.human_task("approve", data=1))

    @workflow("form")
    async def form(ctx):
        got = await human_task("review", schema=Refund)
        note(repr(got))

    @workflow("edit")
    async def edit(ctx):
        note(repr(await human_task("review", data=Refund(amount=5, reason="late"), schema=Refund)))

    @workflow("asks")
    async def asks(ctx):
        told(await human_task("input", title="How many?"))

    @workflow("number")
    async def number(ctx):
        note(repr(await human_task("input", schema=int)))

    @workflow("two")
    async def two(ctx):
        async def one(title):
            told(await human_task("approve", title=title, data=title))

        await parallel([one("first"), one("second")])

    @workflow("beside")
    async def beside(ctx):
        async def work():
            for n in range(3):
                while not (HERE / f"go{n}").exists():
                    await asyncio.sleep(0.01)
                await step(f"work {n}", note, f"worked {n}")

        async def ask():
            told(await human_task("approve"))

        await parallel([ask(), work()])

    @workflow("inner")
    async def inner(ctx):
        told(await human_task("approve", title="inside"))

    @workflow("outer")
    async def outer(ctx):
        await inner.run()

    if __name__ == "__main__":
        if os.environ.get("QUIET"):
            configure(ask=False)
        args = ["a word " * 30] if sys.argv[1] == "expenses" else []
        globals()[sys.argv[1]].options(wait=True).run_sync(*args)
        print("done")
"""
# Makes the terminal that it is started with its own, so that Ctrl-C is a signal.
OWN = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"


class Terminal:
    """A program in a terminal of 80 columns, and what that shows."""

    def __init__(self, folder: Path, *args: str, stdin: bool = True, stderr: bool = True, shell: str | None = None, **env: str) -> None:
        file = write_program(APP, folder, "app.py")
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.slave = slave
        self.before = termios.tcgetattr(slave)
        self.seen = ""
        command = [sys.executable, str(file), *args]
        if shell is not None:
            command = ["sh", "-c", shell.format(" ".join(command))]
        if stdin:
            command = [sys.executable, "-c", OWN, *command]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment(folder, env), start_new_session=True,
            stdin=slave if stdin else subprocess.DEVNULL, stdout=slave, stderr=slave if stderr else subprocess.STDOUT if not stdin else subprocess.DEVNULL,
        )  # fmt: skip
        running.append(self.process)

    def until(self, text: str) -> None:
        """Read on until this is shown after what was waited for before."""
        late = time.monotonic() + 120
        while text not in self.seen:
            assert time.monotonic() < late, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.master, 4096).decode().replace("\r\n", "\n")
            elif self.process.poll() is not None:
                assert text in self.seen, self.seen
        self.shown, _, self.seen = self.seen.partition(text)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def answer(self, prompt: str, text: str) -> None:
        self.until(prompt)
        self.type(text + "\n")

    def ended(self, code: int = 0) -> None:
        """The program has ended, and the terminal is as it was."""
        assert self.process.wait(120) == code, self.seen
        assert termios.tcgetattr(self.slave) == self.before


@pytest.fixture
def start(tmp_path):
    made = []

    def begin(*args, **options):
        made.append(Terminal(tmp_path, *args, **options))
        return made[-1]

    yield begin
    for each in made:
        os.close(each.master)
        os.close(each.slave)


ME = getpass.getuser()
ASK = "Approve? [y]es, [n]o, Enter: later > "
COMMENT = "Comment (Enter: none) > "


def only_task(status: str | None = "open"):
    (task,) = tasks.list(status=status)
    return task


def open_tasks(count: int) -> list:
    while len(found := tasks.list()) < count:
        time.sleep(0.01)
    return found


def test_a_task_is_shown_and_decided_where_the_run_was_started(start, tmp_path):
    screen = start("expenses")
    screen.until(ASK)
    shown = screen.shown
    task = only_task()
    assert f"\nPay this?\ntask {task.id} for manager, run {task.run_id}\n  who: Ada\n  amount: 120\n  key: [redacted" in shown
    assert "  lines:\n    -\n      a: 1\n      b: null\n    - x\n" in shown
    assert "sk-proj" not in shown and "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 80 and shown.count("a word") >= 29
    screen.type("maybe\n")
    screen.until("Please answer y or n")
    screen.answer(ASK, "y")
    screen.answer(COMMENT, "fine, grüße")
    screen.until("Recorded: approved.")
    screen.until("done")
    screen.ended()
    assert notes(tmp_path) == [f"True {ME} fine, grüße None"]
    assert [(entry["what"], entry.get("by")) for entry in only_task(None).trail] == [("opened", None), ("approved", ME)]


def test_a_no_is_a_decision_too_and_plain_code_asks_as_well(start, tmp_path):
    screen = start("plain")
    screen.answer(ASK, "n")
    screen.answer(COMMENT, "")
    screen.until("Recorded: rejected.")
    screen.ended()
    assert notes(tmp_path) == [f"False {ME} None None"]


@pytest.mark.parametrize("flow", ["expenses", "plain"])
@pytest.mark.parametrize("typed", ["\n", "\x04"])
def test_an_empty_answer_and_the_end_of_the_input_leave_the_task_open_and_the_run_waiting(start, tmp_path, typed, flow):
    screen = start(flow)
    screen.until(ASK)
    screen.type(typed)
    task = only_task()
    screen.until(f"Left open. Later: agentflow tasks show {task.id}")
    assert screen.process.poll() is None and runs.list()[0].status == "running"
    tasks.approve(task.id, by="grace")
    screen.until("done")
    screen.ended()
    assert ASK not in screen.shown and notes(tmp_path) == ["True grace None None"]


@pytest.mark.parametrize("flow", ["expenses", "plain"])
def test_the_decision_of_another_is_told_and_the_run_goes_on(start, tmp_path, flow):
    screen = start(flow)
    screen.until(ASK)
    task = only_task()
    tasks.reject(task.id, by="grace", comment="no money")
    screen.until(f"Meanwhile {task.id} was rejected by grace.")
    screen.until("done")
    screen.ended()
    assert notes(tmp_path) == ["False grace no money None"]


def test_the_first_decision_wins_also_at_the_last_moment(start, tmp_path):
    screen = start("expenses")
    screen.answer(ASK, "y")
    screen.until(COMMENT)
    tasks.reject(only_task().id, by="grace")
    screen.type("\n")  # whether or not the run has seen the other decision by now
    screen.until("by grace")
    screen.until("done")
    screen.ended()
    assert notes(tmp_path) == ["False grace None None"]


def test_what_was_typed_for_one_task_is_no_answer_to_the_next(start, tmp_path):
    screen = start("two")
    screen.until(ASK)
    first, second = open_tasks(2)
    title = re.search(r"\n(first|second)\ntask", screen.shown)[1]
    one, other = (first, second) if first.title == title else (second, first)
    screen.type("y")  # not sent off yet
    tasks.approve(one.id, by="grace")
    screen.until(f"Meanwhile {one.id} was approved by grace.")
    screen.until(ASK)
    assert other.title in screen.shown
    screen.type("\n")
    screen.until("Left open.")
    assert only_task().id == other.id
    tasks.reject(other.id, by="grace")
    screen.until("done")
    screen.ended()


def test_tasks_are_asked_one_after_another(start, tmp_path):
    screen = start("two")
    for answer in ("y", "n"):
        screen.answer(ASK, answer)
        screen.answer(COMMENT, "")
    screen.until("done")
    screen.ended()
    assert sorted(notes(tmp_path)) == [f"False {ME} None None", f"True {ME} None None"]


def test_other_branches_go_on_while_somebody_is_asked(start, tmp_path):
    screen = start("beside")
    screen.until(ASK)
    for n in range(3):
        (tmp_path / f"go{n}").touch()
        while f"worked {n}" not in notes(tmp_path):
            assert screen.process.poll() is None
            time.sleep(0.01)
    screen.type("y\n")
    screen.answer(COMMENT, "")
    screen.until("done")
    screen.ended()


def test_a_task_of_a_run_inside_the_run_is_asked(start, tmp_path):
    screen = start("outer")
    screen.answer(ASK, "y")
    screen.answer(COMMENT, "")
    screen.until("done")
    screen.ended()
    assert notes(tmp_path) == [f"True {ME} None None"]


@pytest.mark.parametrize("flow", ["expenses", "plain", "two"])
def test_ctrl_c_leaves_a_run_that_can_go_on_and_a_terminal_as_it_was(start, tmp_path, flow):
    screen = start(flow)
    screen.until(ASK)
    screen.type("ye\x03")
    assert screen.process.wait(60) != 0
    screen.until("KeyboardInterrupt")
    screen.ended(screen.process.returncode)
    assert runs.list()[0].status == "interrupted" and tasks.list()
    for task in tasks.list():
        tasks.approve(task.id, by="grace")
    again = start(flow)
    again.until("done")
    again.ended()
    assert set(notes(tmp_path)) == {"True grace None None"} and ASK not in again.shown


def test_a_form_is_asked_field_by_field_until_it_fits(start, tmp_path):
    screen = start("form")
    screen.answer("Fill it in? [y]es, [n]o, Enter: later > ", "y")
    screen.answer("  amount (whole number) > ", "lots")
    screen.until("amount='lots' has to be a whole number.")
    screen.answer("  amount (whole number) > ", "0")
    screen.until("amount=0 has to be at least 1.")
    screen.answer("  amount (whole number) > ", "30")
    screen.answer("  reason (text) > ", "")
    screen.until("reason needs an answer.")
    screen.answer("  reason (text) > ", "late")
    screen.answer("  urgent (yes or no) [false] > ", "yes")
    screen.answer("  tags (JSON) [[]] > ", '["a", "b"]')
    screen.answer(COMMENT, "")
    screen.until("Recorded: answered.")
    screen.until("done")
    screen.ended()
    assert notes(tmp_path) == ["Refund(amount=30, reason='late', urgent=True, tags=['a', 'b'])"]


def test_what_the_type_refuses_is_asked_again(start, tmp_path):
    screen = start("form")
    screen.answer("Fill it in? [y]es, [n]o, Enter: later > ", "y")
    for reason in ("none", "broken"):
        screen.answer("  amount (whole number) > ", "7")
        screen.answer("  reason (text) > ", reason)
        screen.answer("  urgent (yes or no) [false] > ", "")
        screen.answer("  tags (JSON) [[]] > ", "")
        screen.answer(COMMENT, "")
        if reason == "none":
            screen.until("a reason is needed")
            screen.answer("Fill it in? [y]es, [n]o, Enter: later > ", "yes")
    screen.until("done")
    screen.ended()
    assert notes(tmp_path) == ["Refund(amount=7, reason='broken', urgent=False, tags=[])"]


def test_a_form_that_is_filled_in_is_kept_where_nothing_is_typed(start, tmp_path):
    screen = start("edit")
    screen.answer("Fill it in? [y]es, [n]o, Enter: later > ", "y")
    screen.answer("  amount (whole number) [5] > ", "")
    screen.answer("  reason (text) [late] > ", "broken")
    screen.answer("  urgent (yes or no) [false] > ", "")
    screen.answer("  tags (JSON) [[]] > ", "")
    screen.answer(COMMENT, "")
    screen.until("done")
    screen.ended()
    assert notes(tmp_path) == ["Refund(amount=5, reason='broken', urgent=False, tags=[])"]


@pytest.mark.parametrize(("typed", "data"), [('{"n": 3}', "{'n': 3}"), ("three or so", "'three or so'"), ("", "None")])
def test_other_answers_are_json_or_text(start, tmp_path, typed, data):
    screen = start("asks")
    screen.answer("Answer? [y]es, [n]o, Enter: later > ", "y")
    screen.answer("The answer (JSON, or else text; Enter: none) > ", typed)
    screen.answer(COMMENT, "")
    screen.until("done")
    screen.ended()
    assert notes(tmp_path) == [f"True {ME} None {data}"]


def test_a_type_that_has_no_fields_is_one_answer(start, tmp_path):
    screen = start("number")
    screen.answer("Answer? [y]es, [n]o, Enter: later > ", "y")
    screen.answer("  The answer (whole number) > ", "")
    screen.answer("  The answer (whole number) > ", "12")
    screen.answer(COMMENT, "")
    screen.until("done")
    screen.ended()
    assert notes(tmp_path) == ["12"]


@pytest.mark.parametrize(
    "options",
    [
        {"QUIET": "1"},
        {"AGENTFLOW_ASK": "0"},
        {"stdin": False},
        {"stderr": False},
        {"shell": "set -m; {} & wait"},  # in the background, where reading would stop the program
    ],
)
def test_nobody_is_asked_where_that_is_off_or_there_is_no_terminal(start, tmp_path, options):
    screen = start("expenses", **options)
    task = open_tasks(1)[0]
    tasks.approve(task.id, by="grace")
    screen.until("done")
    assert "Approve?" not in screen.shown and "Left open" not in screen.shown
    screen.process.wait(60)
    assert notes(tmp_path) == ["True grace None None"]


def test_nobody_is_asked_in_tests_and_notebooks(monkeypatch):
    for stream in ("stdin", "stderr"):
        monkeypatch.setattr(getattr(sys, stream), "isatty", lambda: True, raising=False)
    assert terminal.prompter() is None
    monkeypatch.delitem(sys.modules, "_pytest")
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert terminal.prompter() is not None
    monkeypatch.setenv("AGENTFLOW_ASK", "0")
    assert terminal.prompter() is None
    monkeypatch.delenv("AGENTFLOW_ASK")
    configure(ask=False)
    assert terminal.prompter() is None
    configure(ask=None)
    assert terminal.prompter() is not None
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert terminal.prompter() is None
