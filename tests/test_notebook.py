"""``notebooks/first_agent.ipynb``: a clean pair, executed by real kernels that are killed; nothing is bought twice."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentflow import configure, runs, tasks
from tests.kernels import SECONDS, Kernel, Output
from tests.outside import Project
from tests.programs import ROOT

FOLDER = ROOT / "notebooks"
PAIR = (FOLDER / "first_agent.ipynb", FOLDER / "first_agent.py")

# Before the notebook's own cells: each question to the scripted model is noted in a file that outlives the kernel, and
# one of them is not answered while the file "hang" says so.
COUNTED = """
import asyncio, os
from pathlib import Path
import agentflow.testing

class Counted(agentflow.testing.FakeModel):
    async def _reply(self, asked):
        with open("asked.txt", "a") as file:
            file.write(asked["text"].splitlines()[0] + "\\n")
        if Path("hang").exists() and Path("hang").read_text() in asked["text"]:
            Path("hanging").touch()
            await asyncio.sleep(3600)
        return await super()._reply(asked)

agentflow.testing.FakeModel = Counted
"""

GREETING = "Describe a good notebook in three words."
WISHES = "What does this customer want?"
STIFF = "Write a polite answer."
FRIENDLY = "Write an answer in one friendly sentence."
SUBJECT = "Write a subject line for this mail."
ALL = sorted([GREETING, WISHES, STIFF, SUBJECT, FRIENDLY, SUBJECT])


def cells() -> list[str]:
    """The code cells of the notebook, as Jupyter reads them."""
    notebook = json.loads(PAIR[0].read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


CELLS = cells()
IMPORTS, SCRIPT, ASK, CHAIN, EDITED, RUN_EDITED, WAIT, LOOK, APPROVE, GO_ON, EXPORT = range(len(CELLS))


class Notebook:
    """The notebook in a project of its own, over the lives of its kernels."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cells = list(CELLS)
        (folder / "pyproject.toml").touch()
        self.env: dict[str, str] = {}
        self.kernel: Kernel | None = None

    def open(self) -> None:
        self.kernel = Kernel(self.folder, self.env)
        self.kernel.run(COUNTED)

    def kill(self) -> None:
        assert self.kernel is not None
        self.kernel.kill()
        self.close()

    def close(self) -> None:
        if self.kernel is not None:
            self.kernel.__exit__(None, None, None)
            self.kernel = None

    def run(self, *numbers: int) -> list[Output]:
        """Execute cells; none may fail."""
        if self.kernel is None:
            self.open()
        assert self.kernel is not None
        found = []
        for number in numbers:
            output = self.kernel.run(self.cells[number])
            assert not output.error, f"cell {number}:\n{self.cells[number]}\n{output}"
            found.append(output)
        return found

    def run_all(self) -> list[Output]:
        return self.run(*range(len(self.cells)))

    def begin(self, number: int) -> None:
        assert self.kernel is not None
        self.kernel.begin(self.cells[number])

    @property
    def asked(self) -> list[str]:
        """What the scripted model was asked, by all kernels."""
        file = self.folder / "asked.txt"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def notebook(tmp_path: Path) -> Iterator[Notebook]:
    made = Notebook(tmp_path)
    yield made
    made.close()


# -- the pair --------------------------------------------------------------------------------------------


def test_the_notebook_and_its_text_agree_and_hold_no_outputs() -> None:
    import jupytext

    notebook, text = (jupytext.read(path) for path in PAIR)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [(cell.cell_type, cell.source) for cell in text.cells]
    assert jupytext.writes(notebook, fmt="py:percent") == PAIR[1].read_text(encoding="utf-8")
    assert {name: notebook.metadata[name] for name in notebook.metadata} == {**text.metadata, "jupytext": notebook.metadata["jupytext"]}
    for cell in json.loads(PAIR[0].read_text(encoding="utf-8"))["cells"]:
        assert cell["metadata"] == {} and cell.get("outputs", []) == [] and cell.get("execution_count") is None
    assert PAIR[0].read_text(encoding="utf-8") == jupytext.writes(notebook, fmt="ipynb").rstrip("\n") + "\n"


def test_by_one_word_it_asks_the_real_model_also_where_scripted_answers_are_on_record(notebook: Notebook, loopback: Any) -> None:
    notebook.run_all()
    notebook.kill()
    assert [line for line in "\n".join(CELLS).splitlines() if "REAL =" in line] == ["REAL = False"]
    notebook.cells[SCRIPT] = CELLS[SCRIPT].replace("REAL = False", "REAL = True")
    server = loopback()
    notebook.env = server.environment
    shown = notebook.run_all()
    assert sorted(notebook.asked) == ALL, "the scripted model was asked before, and is not any more"
    assert sorted(event["text"].splitlines()[0] for event in server.arrived) == ALL
    assert {body["model"] for body in server.bodies} == {"gpt-5-mini"}
    assert shown[GO_ON].printed.startswith("sent: answer to ")


# -- from the first cell to the last, and again -----------------------------------------------------------


def test_it_runs_from_beginning_to_end_and_says_in_each_cell_what_happened(notebook: Notebook) -> None:
    shown = notebook.run_all()
    assert sorted(notebook.asked) == ALL
    assert shown[ASK].printed == "Nothing is lost.\n1 calls so far\n"
    assert "4 calls so far" in shown[CHAIN].printed and "3 steps: 0 replayed, 3 run" in shown[CHAIN].shown
    plan = shown[EDITED].shown
    assert "-" in plan and "polite" in plan and "friendly" in plan and "wishes" in plan
    assert "6 calls so far" in shown[RUN_EDITED].printed and "3 steps: 1 replayed, 2 run" in shown[RUN_EDITED].shown
    assert "  -Write a polite answer.\n  +Write an answer in one friendly sentence." in shown[RUN_EDITED].shown
    assert "Send this mail?" in shown[WAIT].printed and "agentflow tasks approve t-" in shown[WAIT].printed
    assert "Your order 1042" in shown[LOOK].printed and "sorry about that storm" in shown[LOOK].printed
    assert shown[GO_ON].printed == "sent: Your order 1042\n" and "completed" in shown[GO_ON].shown
    assert "recordings/first_agent.json holds what answer-letter-" in shown[EXPORT].printed

    again = notebook.run(*range(ASK, len(CELLS)))  # in the same kernel
    assert sorted(notebook.asked) == ALL
    assert "3 steps: 3 replayed, 0 run" in again[CHAIN - ASK].shown
    assert again[WAIT - ASK].printed == again[GO_ON - ASK].printed == "sent: Your order 1042\n"

    notebook.kill()
    fresh = notebook.run_all()
    assert sorted(notebook.asked) == ALL, "nothing is asked again after a restart"
    assert fresh[ASK].printed == "Nothing is lost.\n0 calls so far\n"
    assert "3 steps: 3 replayed, 0 run" in fresh[CHAIN].shown and "3 steps: 3 replayed, 0 run" in fresh[RUN_EDITED].shown
    assert "completed before" in fresh[GO_ON].shown and fresh[LOOK].printed == ""


def test_a_kernel_killed_after_any_cell_costs_nothing(notebook: Notebook) -> None:
    for last in (ASK, CHAIN, EDITED, RUN_EDITED, WAIT, APPROVE):
        notebook.run(*range(last + 1))
        notebook.kill()
    shown = notebook.run_all()
    assert sorted(notebook.asked) == ALL
    assert shown[GO_ON].printed == "sent: Your order 1042\n" and "0 calls so far" in shown[RUN_EDITED].printed
    configure(path=notebook.folder / "journal")
    assert [(run.workflow, run.status) for run in runs.list()] == [("send-mail", "completed"), ("answer-letter", "completed")]
    assert [task.status for task in tasks.list(status=None)] == ["approved"]


@pytest.mark.parametrize(
    "number, question",
    [
        (ASK, GREETING),
        *(pytest.param(*each, marks=pytest.mark.torture) for each in ((CHAIN, STIFF), (RUN_EDITED, FRIENDLY))),
    ],
)
def test_a_kernel_killed_during_a_call_asks_that_one_again_and_no_other(notebook: Notebook, number: int, question: str) -> None:
    notebook.run(*range(number))
    (notebook.folder / "hang").write_text(question)
    notebook.begin(number)
    deadline = time.monotonic() + SECONDS
    while not (notebook.folder / "hanging").exists():
        assert time.monotonic() < deadline, "the call was never made"
        time.sleep(0.01)
    notebook.kill()
    (notebook.folder / "hang").unlink()
    shown = notebook.run_all()
    assert sorted(notebook.asked) == sorted([*ALL, question])
    assert shown[GO_ON].printed == "sent: Your order 1042\n"
    if number == CHAIN:
        assert "answer: in doubt" in shown[CHAIN].shown and "1 replayed, 2 run" in shown[CHAIN].shown


def test_cells_in_another_order_and_many_times_ask_nothing_more(notebook: Notebook) -> None:
    notebook.run_all()
    notebook.run(GO_ON, RUN_EDITED, CHAIN, EDITED, RUN_EDITED, ASK, ASK, EDITED, GO_ON, WAIT, EXPORT, CHAIN, RUN_EDITED, APPROVE)
    assert sorted(notebook.asked) == ALL


def test_a_prompt_edited_in_its_cell_asks_it_and_what_follows_from_it(notebook: Notebook) -> None:
    notebook.run_all()
    before = len(notebook.asked)
    notebook.cells[EDITED] = CELLS[EDITED].replace("one friendly sentence.", "one friendly sentence, signed Bob.")
    notebook.cells[SCRIPT] = CELLS[SCRIPT].replace('"one friendly', '"signed Bob": "Dear Ada, done! Bob",\n        "one friendly')
    shown = notebook.run(SCRIPT, EDITED, RUN_EDITED, WAIT)
    assert notebook.asked[before:] == ["Write an answer in one friendly sentence, signed Bob.", SUBJECT]
    assert "1 replayed, 2 run" in shown[2].shown and "waits for task" in shown[3].printed, "another mail asks you again"
    notebook.kill()
    notebook.run(*range(GO_ON), GO_ON, EXPORT)
    assert len(notebook.asked) == before + 2
    notebook.cells = list(CELLS)  # back to the first wording: its answers are still there, and so is the approval
    assert notebook.run(SCRIPT, EDITED, RUN_EDITED, WAIT)[3].printed == "sent: Your order 1042\n"
    assert len(notebook.asked) == before + 2


# -- the recording ----------------------------------------------------------------------------------------


@pytest.mark.torture
def test_the_recording_that_it_exports_is_played_by_a_test_as_the_notebook_says(notebook: Notebook, tmp_path: Path) -> None:
    notebook.run_all()
    notebook.close()
    outside = tmp_path / "outside"
    outside.mkdir()
    project = Project(outside)
    letters = "from agentflow import configure, generate_content, workflow\nconfigure(model='openai:scripted')\n"
    project.write("letters.py", letters + CELLS[EDITED].partition("\n\n\nawait ")[0] + "\n")
    letter: Any = next(line for line in CELLS[CHAIN].splitlines() if line.startswith("letter = "))
    said = "".join(json.loads(PAIR[0].read_text())["cells"][-1]["source"])
    test = said.split("```python\n")[1].split("```")[0].replace('"Hello, my parcel ..."', letter.removeprefix("letter = "))
    project.write("test_letters.py", test)
    project.write("pytest.ini", "[pytest]\npythonpath = .\n")
    shutil.copytree(notebook.folder / "recordings", project.folder / "recordings")
    done = project.pytest()
    assert (done.code, done.passed) == (0, 1), done
    assert "no test asked for" not in done.text, done
