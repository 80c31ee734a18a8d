"""``runs export --recording``: any run becomes a recording, which a test somewhere else plays without a network."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentflow import Reply, configure, embed, generate_content, parallel, runs, step, sync, workflow
from agentflow.cli.app import run as cli
from agentflow.errors import ModelError, RunNotFound, Truncated, UsageError, Waiting
from agentflow.testing import FakeModel, NotRecorded, Recording, export_recording
from tests.outside import Project
from tests.programs import ROOT, environment

OPENAI, CHAT, CLAUDE = "openai:gpt-5-mini", "openai-chat:gpt-4o-mini", "anthropic:claude-haiku-4-5"
EMBEDDING = "openai:text-embedding-3-small"
SECRET = "sk-proj-abcdefghij0123456789ABCDEFGHIJ"


def calls_of(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["calls"]


# -- from a run, by the command line, to another project ----------------------------------------------

APP = """
    from agentflow import Reply, embed, generate_content, parallel, tool, workflow

    @tool
    def people_in(town: str) -> int:
        \"\"\"How many people live there.\"\"\"
        return len(town)

    @workflow("chapter")
    async def chapter(ctx, title: str) -> str:
        return await generate_content(f"Write about {title}.", model="anthropic:claude-haiku-4-5")

    @workflow("book")
    async def book(ctx, towns: list[str]):
        talk = await generate_content("Which is larger?", data=towns, model="openai:gpt-5-mini", tools=[people_in], output_type=Reply)
        vectors = await embed(towns, model="openai:text-embedding-3-small")
        chapters = await parallel([chapter.run(town) for town in towns])
        last = await generate_content("Sum up.", data=chapters, model="openai-chat:gpt-4o-mini", output_type=Reply)
        return [
            [talk.text, talk.finish_reason, talk.usage.input_tokens, talk.usage.output_tokens, str(talk.cost)],
            vectors, chapters, [last.text, last.finish_reason, last.usage.input_tokens, str(last.cost)],
        ]
"""
PROGRAM = f"""
    import json
    from agentflow.testing import FakeModel, ToolCall, when
    from app import book

    replies = [
        [ToolCall("people_in", town="Rome"), ToolCall("people_in", town="Paris")], f"Paris, says {SECRET}.",
        when("about Rome", "Rome is old."), when("about Paris", "Paris is large."), when("Sum up", "Two towns."),
    ]
    with FakeModel(replies):
        print(json.dumps(book.run_sync(["Rome", "Paris"])))
"""
TEST = """
    import json
    from pathlib import Path
    import pytest
    from app import book

    @pytest.mark.recorded
    def test_book():
        assert book.run_sync(["Rome", "Paris"]) == json.loads(Path(__file__).with_name("right.json").read_text())
"""


@pytest.mark.torture
def test_a_run_exported_by_the_command_line_is_played_by_a_test_of_another_project(tmp_path: Path) -> None:
    project = Project(tmp_path)
    app = project.write("app.py", APP)
    program = project.write("program.py", PROGRAM)
    env = environment(tmp_path, {"PYTHONPATH": f"{ROOT}:{app.parent}"})
    done = subprocess.run([sys.executable, str(program)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (run,) = [run for run in runs_of(tmp_path) if run["workflow"] == "book"]
    file = project.folder / "tests/recordings/test_book/test_book.json"
    command = [sys.executable, "-m", "agentflow", "runs", "export", run["id"], "--recording", str(file)]
    told = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert (told.returncode, told.stdout) == (0, "") and f"6 model calls of {run['id']} written to {file}" in told.stderr.replace("\n", "")

    text = file.read_text()
    assert SECRET not in text and "[redacted:openai-key]" in text
    assert [call["endpoint"] for call in calls_of(file)].count("messages") == 2
    assert "\n" + " " * 14 + "[" not in text and '"embedding": [0.' in text, "a vector is one line"
    project.write("tests/right.json", done.stdout.replace(SECRET, "[redacted:openai-key]"))
    project.write("tests/test_book.py", TEST)
    project.write("pyproject.toml", "[tool.pytest.ini_options]\npythonpath = ['.']\n")
    for more in ((), ("-n", "2")):
        played = project.pytest(*more)
        assert (played.code, played.passed) == (0, 1), played
        assert "no test asked for" not in played.text, played
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and "exists already" in again.stderr

    project.write("app.py", APP.replace("Sum up.", "Sum it up."))
    stale = project.pytest()
    assert (stale.code, stale.failed) == (1, 1), stale
    assert re.search(r'^E? *-\s+"content": "Sum up\.', stale.text, re.M) and re.search(r'^E? *\+\s+"content": "Sum it up\.', stale.text, re.M), stale


def runs_of(folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "agentflow", "runs", "list", "--json"]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, timeout=120, cwd=ROOT)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_what_cells_and_scripts_asked_is_exported_as_scratch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cells.json"
    assert cli(["runs", "export", "scratch", "--recording", str(file)]) == 4, "there is no journal yet"
    with FakeModel(["Hello!"]):
        assert sync.generate_content("Hi", model=CLAUDE) == "Hello!"
        vectors = asyncio.run(embed(["a", "b"], model=EMBEDDING))
    assert cli(["runs", "export", "scratch"]) == 2
    assert "--recording FILE" in capsys.readouterr().err
    assert cli(["runs", "export", "scratch", "--recording", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": "scratch", "recording": str(file), "calls": 2}
    configure(path=tmp_path / "other")
    with Recording(file) as recording:
        assert sync.generate_content("Hi", model=CLAUDE) == "Hello!"
        assert asyncio.run(embed(["b", "a"], model=EMBEDDING)) == vectors[::-1]
    assert recording.unused() == []


def test_a_run_is_exported_from_python_beside_its_page(tmp_path: Path) -> None:
    @workflow("one")
    async def one(ctx) -> str:
        return await generate_content("Hi", model=OPENAI)

    with FakeModel(["Hello!"]):
        one.run_sync()
    (run,) = one.runs()
    assert run.export(tmp_path / "one.json", recording=True) == tmp_path / "one.json"
    with Recording(tmp_path / "one.json"):
        assert one.options(fresh=True).run_sync() == "Hello!"
    with pytest.raises(UsageError, match="exists already"):
        run.export(tmp_path / "one.json", recording=True)
    run.export(tmp_path / "one.json")  # that of the run itself is replaced, as ever
    assert "agentflow_recording" not in (tmp_path / "one.json").read_text()


# -- which replies --------------------------------------------------------------------------------------


def played(flow: Any, file: Path, *args: Any) -> Any:
    """The result of a run in a journal of its own, with nothing but the recording; all of it has to be used."""
    configure(path=file.parent / f"{file.stem}-journal")
    try:
        with Recording(file) as recording:
            found = flow.run_sync(*args)
        assert recording.unused() == [], recording.unused()
        return found
    finally:
        configure(path=None)


def export(flow: Any, file: Path, workflow_name: str | None = None) -> int:
    (run,) = runs.list(workflow=workflow_name or flow.name)
    return export_recording(run.id, file)


def test_replies_that_were_asked_for_anew_are_left_out_and_the_last_one_is_played(tmp_path: Path) -> None:
    async def write(title: str) -> str:
        return await generate_content(f"Write about {title}.", model=OPENAI)

    @workflow("letter")
    async def letter(ctx) -> list[str]:
        draft = await generate_content("Draft it.", model=OPENAI, name="draft")
        return [draft, await step("write", write, "tea")]

    with FakeModel(["first", "tea 1", "second", "tea 2", "third"]):
        letter.run_sync()
        letter.options(rerun=["draft"]).run_sync()
        assert letter.options(rerun=["write"]).run_sync() == ["second", "tea 2"]
        assert letter.options(rerun=["draft"]).run_sync() == ["third", "tea 2"]
    assert export(letter, tmp_path / "letter.json") == 2
    assert played(letter, tmp_path / "letter.json") == ["third", "tea 2"]


def test_a_prompt_that_was_edited_leaves_only_its_newest_reply(tmp_path: Path) -> None:
    prompt = "Be short."

    @workflow("edited")
    async def edited(ctx) -> str:
        return await generate_content(prompt, model=OPENAI)

    with FakeModel({"short": "short", "long": "long"}):
        edited.run_sync()
        prompt = "Be long."
        assert edited.run_sync() == "long"
    assert export(edited, tmp_path / "edited.json") == 1
    assert played(edited, tmp_path / "edited.json") == "long"


def test_replies_that_a_retry_could_not_use_are_kept_in_their_order(tmp_path: Path) -> None:
    async def ask() -> str:
        text = await generate_content("A town?", model=CHAT)
        if text == "no":
            raise ValueError("not a town")
        return text

    @workflow("towns")
    async def towns(ctx) -> str:
        return await step("ask", ask, retry={"max_attempts": 3, "initial_delay": 0.001})

    with FakeModel(["no", "no", "Rome"]):
        assert towns.run_sync() == "Rome"
    assert export(towns, tmp_path / "towns.json") == 3
    assert played(towns, tmp_path / "towns.json") == "Rome"


def test_a_failed_run_is_a_recording_too(tmp_path: Path) -> None:
    @workflow("failing")
    async def failing(ctx) -> str:
        await generate_content("Hi", model=OPENAI)
        return await generate_content("More", model=CLAUDE)

    with FakeModel(["Hello!", Truncated("so f")]), pytest.raises(Truncated):
        failing.run_sync()
    assert export(failing, tmp_path / "failing.json") == 2
    with pytest.raises(Truncated) as caught:
        played(failing, tmp_path / "failing.json")
    assert caught.value.reply.text == "so f"


def test_a_fork_and_a_run_with_a_keyed_step_bring_what_others_paid_for(tmp_path: Path) -> None:
    async def name(topic: str) -> str:
        return await generate_content(f"Name {topic}.", model=OPENAI)

    @workflow("naming")
    async def naming(ctx, topic: str, more: str = "") -> list[str]:
        named = await step("name", name, topic, idempotency_key=f"name-{topic}")
        return [named, await generate_content(f"Praise {named}{more}.", model=CLAUDE, name="praise")]

    with FakeModel(["Tea Time", "Great.", "Greater.", "Greatest."]):
        first = naming.options(run_id="first").run_sync("tea")
        assert naming.options(run_id="second").run_sync("tea", " more")[0] == first[0]
        fork = runs.get("first").fork(from_step="praise")
        assert fork.run_sync() == ["Tea Time", "Greatest."]
    for run_id, args, right in [("second", ("tea", " more"), "Greater."), (fork.id, ("tea",), "Greatest.")]:
        file = tmp_path / f"{run_id}.json"
        assert export_recording(run_id, file) == 2
        assert played(naming, file, *args) == ["Tea Time", right]


@workflow("index")
async def index(ctx, texts: list[str], dimensions: int | None = None) -> list[list[float]]:
    return await embed(texts, model=EMBEDDING, dimensions=dimensions)


def test_vectors_that_another_run_bought_are_exported_and_found_text_by_text(tmp_path: Path) -> None:
    with FakeModel([]) as model:
        index.options(run_id="one").run_sync(["a", f"b {SECRET}"])
        grown = index.options(run_id="two").run_sync(["c", f"b {SECRET}"])
        index.options(run_id="three").run_sync(["a"], 3)
    assert model.embedded == [["a", f"b {SECRET}"], ["c"], ["a"]]
    file = tmp_path / "two.json"
    assert export_recording("two", file) == 2
    assert SECRET not in file.read_text()
    assert played(index, file, ["c", f"b {SECRET}"]) == grown
    configure(path=tmp_path / "another")
    with Recording(file):
        with pytest.raises(NotRecorded, match="text-embedding-3-small 'a | d'"):
            index.run_sync(["a", "d"])
        with pytest.raises(NotRecorded):
            index.options(fresh=True).run_sync(["a"], 3)  # other dimensions are another question
    configure(path=None)
    runs.purge(older_than=0)
    with FakeModel([]) as model:
        assert index.options(run_id="four").run_sync(["c"]) == grown[:1]
    assert model.embedded == []
    export_recording("four", tmp_path / "four.json")
    assert played(index, tmp_path / "four.json", ["c"]) == grown[:1]


def test_only_texts_that_are_not_recorded_are_asked_when_recording(tmp_path: Path) -> None:
    from tests.loopback import Loopback

    with FakeModel([]):
        index.options(run_id="one").run_sync(["a", "b"])
    export_recording("one", tmp_path / "one.json")
    configure(path=tmp_path / "other")
    with Loopback() as server, pytest.MonkeyPatch.context() as patch:
        for key, value in server.environment.items():
            patch.setenv(key, value)
        with Recording(tmp_path / "one.json", "once"):
            assert len(index.run_sync(["b", "c", "a"])) == 3
        assert [asked["input"] for asked in server.bodies] == [["c"]]


@pytest.mark.parametrize("model", [OPENAI, CHAT, CLAUDE])
def test_a_batch_is_exported_and_played_call_by_call(tmp_path: Path, model: str) -> None:
    @workflow(f"labels-{model}")
    async def labels(ctx, batch: bool) -> list[str]:
        return await parallel([generate_content(f"Label {n}", model=model, batch=batch) for n in range(3)])

    with FakeModel(lambda request: f"got {request['text']}", polls=0):
        with pytest.raises(Waiting):
            labels.run_sync(True)
        right = labels.run_sync(True)
    assert export(labels, tmp_path / "labels.json") == 3
    assert played(labels.options(wait=True), tmp_path / "labels.json", True) == right
    assert played(labels, tmp_path / "labels.json", False) == right


@pytest.mark.parametrize("model", [OPENAI, CHAT, CLAUDE])
def test_what_a_batch_asks_is_recorded_by_single_calls(tmp_path: Path, model: str, loopback: Any) -> None:
    server = loopback()

    @workflow(f"live-{model}")
    async def live(ctx) -> list[str]:
        return await parallel([generate_content(f"Label {n}", model=model, batch=True) for n in range(3)])

    with Recording(tmp_path / "live.json", "once"):
        right = live.options(wait=True).run_sync()
    assert len(server.arrived) == len(calls_of(tmp_path / "live.json")) == 3 and server.batching_events == []
    assert played(live.options(wait=True), tmp_path / "live.json") == right


def test_a_batch_that_breaks_off_while_it_is_recorded_asks_only_for_the_rest_again(tmp_path: Path, loopback: Any) -> None:
    server = loopback(None, "reset", {"status": 503, "body": "<html>busy</html>"})

    @workflow("breaks-off")
    async def breaks_off(ctx, retry: bool = True) -> list[str]:
        once = {"max_attempts": 2 if retry else 1, "initial_delay": 0.001}
        return await parallel([generate_content(f"Label {n}", model=OPENAI, batch=True, retry=once) for n in range(4)])

    with Recording(tmp_path / "x.json", "once"):
        for _ in range(5):
            try:
                right = breaks_off.options(wait=True).run_sync()
                break
            except ModelError:
                continue
    answered = [event["n"] for event in server.answered if event["status"] == 200]
    assert len(answered) == len(calls_of(tmp_path / "x.json")) == 4, "each is paid for once"
    assert played(breaks_off.options(wait=True), tmp_path / "x.json") == right


def test_a_call_in_the_background_is_exported_and_played(tmp_path: Path) -> None:
    @workflow("long")
    async def long(ctx) -> list[Any]:
        reply = await generate_content("Think.", model=OPENAI, background=True, output_type=Reply)
        return [reply.text, reply.finish_reason, reply.usage.output_tokens]

    with FakeModel(["A thought."], polls=2):
        right = long.run_sync()
    assert export(long, tmp_path / "long.json") == 1
    assert played(long, tmp_path / "long.json") == right


def test_a_call_in_the_background_is_recorded_once_it_has_ended(tmp_path: Path, loopback: Any) -> None:
    server = loopback()
    server.polls = 2

    @workflow("long")
    async def long(ctx, background: bool) -> str:
        return await generate_content("Think.", model=OPENAI, background=background)

    with Recording(tmp_path / "long.json", "once"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTFLOW_POLL_SECONDS", "0.001")
        right = long.run_sync(True)
    assert len(server.looked) == 3 and len(server.arrived) == 1
    (call,) = calls_of(tmp_path / "long.json")
    assert call["reply"]["status"] == "completed" and "background" not in call["request"]
    assert [played(long, tmp_path / "long.json", way) for way in (True, False)] == [right, right]


def test_a_run_without_calls_and_a_run_that_is_not_there_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @workflow("nothing")
    async def nothing(ctx) -> int:
        return 1

    nothing.run_sync()
    with pytest.raises(RunNotFound):
        export_recording("no-such-run", tmp_path / "x.json")
    assert cli(["runs", "export", nothing.runs()[0].id, "--recording", str(tmp_path / "x.json")]) == 2
    assert "no model calls" in capsys.readouterr().err
    assert cli(["runs", "export", "no-such-run", "--recording", str(tmp_path / "x.json")]) == 4
    assert not (tmp_path / "x.json").exists()


def test_error_replies_stand_in_no_recording(tmp_path: Path) -> None:
    @workflow("busy")
    async def busy(ctx) -> str:
        return await generate_content("Hi", model=OPENAI, retry={"max_attempts": 2, "initial_delay": 0.001})

    with FakeModel([ModelError("busy", status=503), "Hello!"]):
        busy.run_sync()
    assert export(busy, tmp_path / "busy.json") == 1
    assert played(busy, tmp_path / "busy.json") == "Hello!"


