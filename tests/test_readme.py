"""The README tells the truth: its programs run, its commands exist, and .ci/run uses its test command."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from agentflow.cli.app import run
from agentflow.testing import FakeModel
from tests.loopback import Loopback
from tests.outside import Project
from tests.programs import ROOT, run_program

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
SHELL = "\n".join(re.findall(r"^```sh\n(.*?)^```$", README, re.DOTALL | re.MULTILINE))


def answer(request):
    if "team" in str(request["body"].get("text", "")):
        return {"team": "billing", "urgent": "noon" in request["text"]}
    return f"An answer to {request['text'][:20]!r}."


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_a_program_of_the_readme_runs_as_printed_and_replays_when_run_again(number, tmp_path, monkeypatch, again):
    program = tmp_path / "program.py"
    program.write_text(PROGRAMS[number], encoding="utf-8")
    shutil.copytree(ROOT / "prompts", tmp_path / "prompts")
    (tmp_path / "mails").mkdir()
    for name in ("one", "two", "three"):
        (tmp_path / "mails" / f"{name}.txt").write_text(f"mail {name}")
    monkeypatch.chdir(tmp_path)
    with FakeModel(answer) as model:
        runpy.run_path(str(program), run_name="__main__")
        first = len(model.calls)
        own = ("FakeModel", "FakePeople", "def test_")  # programs that bring their own model
        assert "generate_content(" not in PROGRAMS[number] or any(w in PROGRAMS[number] for w in own) or first > 0
        if any(word in PROGRAMS[number] for word in ("tasks.approve", *own)):
            return  # a decision is made once; a FakeModel wants to be asked
        again()
        runpy.run_path(str(program), run_name="__main__")
        assert len(model.calls) == first


def test_an_edited_prompt_is_planned_and_asks_again_and_an_added_message_asks_once(tmp_path, monkeypatch, again):
    source = next(program for program in PROGRAMS if "load_prompt" in program)
    program = tmp_path / "program.py"
    program.write_text(source)
    shutil.copytree(ROOT / "prompts", tmp_path / "prompts")
    monkeypatch.chdir(tmp_path)
    asked = []

    def run_it():
        again()
        with FakeModel(answer) as model:
            found = runpy.run_path(str(program), run_name="__main__")
        asked.append(len(model.calls))
        return found

    run_it()
    prompt = tmp_path / "prompts" / "triage.md"
    prompt.write_text(prompt.read_text().replace("how urgent is it?", "can it wait?"))
    run_it()
    source = source.replace("triage.run_sync(messages)", "triage.run_sync(messages + ['And one more.'])")
    program.write_text(source)
    run_it()
    assert asked == [2, 2, 3]  # another list is another run, which shares nothing with the first


def test_the_test_of_the_readme_is_recorded_once_and_then_needs_nobody(tmp_path):
    (source,) = [program for program in PROGRAMS if "def test_" in program]
    project = Project(tmp_path)
    project.write("test_rivers.py", source)
    missing = project.pytest()
    assert missing.failed == 1 and "pytest test_rivers.py::test_rivers --agentflow-record=once" in missing.text, missing
    with Loopback(script=[{"text": "Danube, Rhine, Volga"}]) as server:
        command = re.search(r"^pytest (\S+) ", SHELL, re.MULTILINE)[1]
        assert project.pytest(command, env=server.environment).passed == 1 and len(server.arrived) == 1
    assert (project.folder / "recordings/test_rivers/test_rivers.json").exists()
    assert project.pytest().passed == 1


def test_the_prompt_file_of_the_readme_is_one_whatever_classes_agentflow_has_itself(tmp_path):
    (text,) = re.findall(r"^```\n(---\n.*?)^```$", README, re.DOTALL | re.MULTILINE)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "sort.md").write_text(text)
    (tmp_path / "tickets.py").write_text("import pydantic\nclass Ticket(pydantic.BaseModel):\n    team: str\n")
    program = """
        from tickets import Ticket
        from agentflow.sync import generate_content
        from agentflow.testing import FakeModel

        with FakeModel([{"team": "billing"}, {"team": "sales"}]) as model:
            for message in ("Where is my money?", "I want ten."):
                found = generate_content(load_prompt("sort", company="Acme", message=message))
                assert isinstance(found, Ticket), found
        body = model.calls[0]["body"]
        print(found.team, body["model"], body["max_tokens"], body["system"])
    """
    assert run_program(program, tmp_path).out == "sales claude-haiku-4-5 500 You sort support mail for Acme.\n"


def test_there_are_programs_and_commands_in_the_readme():
    assert len(PROGRAMS) >= 6
    assert "agentflow demo" in SHELL


def test_every_agentflow_command_of_the_readme_exists(capsys):
    commands = re.findall(r"agentflow ((?:runs|tasks|journal) [a-z]+|plan|demo|cost|doctor|worker)\b", README)
    assert len(set(commands)) >= 15
    for command in set(commands):
        assert run([*command.split(), "--help"]) == 0, command


def test_ci_runs_exactly_the_test_command_of_the_readme():
    extract = re.search(r"command=\$\((awk .*?README\.md)\)", (ROOT / ".ci" / "run").read_text())[1]
    found = subprocess.run(["bash", "-c", extract], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert found == 'pip install ".[test]" && python -m pytest -n 2'
    assert f"<!-- the test command -->\n```sh\n{found}\n```" in README


def test_the_files_that_the_readme_links_to_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links and all((ROOT / link).is_file() for link in links)


def test_the_ten_line_example_has_about_ten_lines():
    assert sum(bool(line.strip()) for line in PROGRAMS[0].splitlines()) <= 12


def test_the_text_files_name_no_place_of_this_machine():
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "notebooks" / "README.md", ROOT / ".ci" / "run"):
        text = Path(path).read_text(encoding="utf-8")
        assert not re.search(r"/(home|root|work|Users)/", text), path
