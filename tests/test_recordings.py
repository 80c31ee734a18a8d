"""Recorded replies, from outside: recorded once from a counting server, then replayed without one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from agentflow import generate_content, runs, workflow
from agentflow.errors import Truncated, UsageError
from agentflow.testing import FakeModel, NotRecorded, Recording, export_recording
from tests.loopback import Loopback, answer_to
from tests.outside import Project

APP = """
    import pydantic
    from agentflow import Reply, generate_content, load_prompt, parallel, workflow

    class Town(pydantic.BaseModel):
        name: str
        people: int

    @workflow
    async def tour(ctx, towns: list[str], model: str = "openai:gpt-5-mini"):
        async def about(town):
            return await generate_content(load_prompt("about", town=town), model=model, output_type=Town)
        found = await parallel.map(about, towns)
        reply = await generate_content("Now a summary.", data=towns, model=model, output_type=Reply)
        return found, reply
"""
PROMPT = "You know every town.\n\nTell me about {{ town }}.\nBe brief.\n"
TEST = """
    import pytest
    from app import tour

    @pytest.mark.recorded
    def test_tour():
        towns, reply = tour.run_sync(["Rome", "Paris"])
        assert [town.people for town in towns] == [len(town.name) for town in towns]
        assert reply.finish_reason == "stop" and reply.usage.input_tokens > 0 and reply.usage.output_tokens > 0
"""
MODELS = ["openai:gpt-5-mini", "openai-chat:gpt-4o-mini", "anthropic:claude-haiku-4-5"]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = Project(tmp_path)
    made.write("pyproject.toml", "")
    made.write("app.py", APP)
    made.write("prompts/about.md", PROMPT)
    made.write("tests/test_tour.py", TEST)
    made.write("conftest.py", "")
    return made


FILE = "tests/recordings/test_tour/test_tour.json"


def record(project: Project, *args: str, mode: str = "once") -> int:
    """Record from a server; how many requests arrived there."""
    with Loopback() as server:
        done = project.pytest(f"--agentflow-record={mode}", *args, env=server.environment)
        assert done.code == 0, done
        return len(server.arrived)


def test_a_recorded_test_passes_without_a_network_again_and_again(project: Project) -> None:
    marks = f"@pytest.mark.recorded\n    @pytest.mark.parametrize('model', {MODELS})"
    source = TEST.replace("@pytest.mark.recorded", marks).replace("test_tour()", "test_tour(model)")
    project.write("tests/test_tour.py", source.replace('["Rome", "Paris"])', '["Rome", "Paris"], model)'))
    assert record(project) == 9
    files = sorted((project.folder / "tests/recordings/test_tour").iterdir())
    texts = [file.read_text() for file in files]
    assert len(files) == 3
    for text in texts:
        assert len(json.loads(text)["calls"]) == 3 and '"agentflow_recording": 1' in text and "\n      " in text
    done = project.pytest()
    assert (done.code, done.passed) == (0, 3), done
    assert "no test asked for" not in done.text
    assert [file.read_text() for file in files] == texts
    assert record(project) == 0  # what is recorded is not paid again
    assert record(project, mode="all") == 9


@pytest.mark.torture
def test_recorded_tests_pass_in_several_processes(project: Project) -> None:
    record(project)
    done = project.pytest("-n", "2")
    assert (done.code, done.passed) == (0, 1), done
    assert "no test asked for" not in done.text


def test_a_missing_recording_fails_with_the_command_that_records_it_and_sends_nothing(project: Project) -> None:
    with Loopback() as server:
        done = project.pytest(env=server.environment)
        assert server.arrived == []
    assert (done.code, done.failed) == (1, 1), done
    assert f"{FILE} does not exist" in done.text and "Nothing was sent" in done.text, done
    assert "Asked in app.py, line 12." in done.text and "agentflow/engine.py" not in done.text, "the user's own line, and no others"
    assert "pytest tests/test_tour.py::test_tour --agentflow-record=once" in done.text


@pytest.mark.torture
def test_a_stale_prompt_fails_with_the_difference_to_the_nearest_recording(project: Project) -> None:
    record(project)
    project.write("prompts/about.md", PROMPT.replace("Be brief.", "Be funny."))
    done = project.pytest()
    assert (done.code, done.failed) == (1, 1), done
    assert re.search(r"^E? *-\s+Be brief\.", done.text, re.M) and re.search(r"^E? *\+\s+Be funny\.", done.text, re.M), done
    assert re.search(r"^E?\s+Tell me about (Rome|Paris)\.$", done.text, re.M), done  # the nearest, not just any
    assert "pytest tests/test_tour.py::test_tour --agentflow-record=once" in done.text
    assert record(project) == 2  # the summary's request is as it was
    assert (project.folder / FILE).read_text().count("Be brief.") == 0
    assert project.pytest().code == 0


@pytest.mark.torture
def test_code_that_swallows_the_error_does_not_make_a_test_pass(project: Project) -> None:
    project.write("tests/test_tour.py", TEST.replace("        towns, reply", "        try: tour.run_sync(['Ur'])\n        except Exception: return\n        towns, reply"))
    done = project.pytest()
    assert (done.code, done.failed) == (1, 1) and "No recording fits this request" in done.text, done


@pytest.mark.torture
def test_unused_recordings_are_reported_and_removed_when_it_is_recorded_again(project: Project) -> None:
    record(project)
    project.write("tests/test_tour.py", TEST.replace('["Rome", "Paris"]', '["Rome"]'))
    assert record(project) == 1
    assert len(json.loads((project.folder / FILE).read_text())["calls"]) == 2
    document = json.loads((project.folder / FILE).read_text())
    document["calls"].append({**document["calls"][0], "request": {"model": "gpt-5-mini", "input": [{"role": "user", "content": "Who was Ur?"}]}})
    (project.folder / FILE).write_text(json.dumps(document))
    for parallel in ((), ("-n", "1")):  # with xdist another process reports
        done = project.pytest(*parallel)
        assert (done.code, done.passed) == (0, 1), done
        assert "recorded replies that no test asked for" in done.text and "'Who was Ur?'" in done.text, done
    assert record(project) == 0
    assert "Who was Ur" not in (project.folder / FILE).read_text()


@pytest.mark.torture
def test_what_a_test_that_then_fails_has_paid_for_is_kept(project: Project) -> None:
    project.write("tests/test_tour.py", TEST.replace("towns, reply =", "1 / 0 if tour.run_sync(['Ur']) else 0\n        towns, reply ="))
    with Loopback() as server:
        assert project.pytest("--agentflow-record=once", env=server.environment).failed == 1
        assert len(server.arrived) == 2
    project.write("tests/test_tour.py", TEST.replace('["Rome", "Paris"]', '["Ur"]'))
    assert record(project) == 0


@pytest.mark.torture
def test_the_same_request_asked_more_often_than_recorded_is_told(project: Project) -> None:
    record(project)
    project.write("tests/test_tour.py", TEST.replace("towns, reply =", "tour.run_sync(['Rome', 'Paris'])\n        towns, reply ="))
    assert project.pytest().code == 0  # the journal knows the answers
    project.write("tests/test_tour.py", TEST.replace("towns, reply =", "tour.run_sync(['Rome', 'Paris'])\n        towns, reply =").replace('"Paris"]', '"Paris", "Rome"]'))
    done = project.pytest()
    assert done.failed == 1 and "holds this request 1 times, and it is asked once more" in done.text, done


SECRET = "sk-proj-abcdefghij0123456789ABCDEFGHIJ"


@pytest.mark.torture
def test_secrets_are_masked_in_requests_and_replies_and_both_runs_see_the_same(project: Project) -> None:
    project.write(
        "tests/test_tour.py",
        """
        import os
        import pytest
        from agentflow import generate_content
        from agentflow.sync import generate_content

        @pytest.mark.recorded
        def test_tour():
            key = os.environ.get("TEAM_API_KEY", "")
            reply = generate_content(f"My key is {key or '[redacted:TEAM_API_KEY]'}. What is yours?", model="openai:gpt-5-mini")
            assert reply == "It is [redacted:openai-key]."
            assert generate_content(f"You said: {reply}", model="openai:gpt-5-mini") == "So it is."
        """,
    )
    with Loopback(script=[{"text": f"It is {SECRET}."}, {"text": "So it is."}]) as server:
        team = {"TEAM_API_KEY": "correct horse battery staple"}
        done = project.pytest("--agentflow-record=once", env={**server.environment, **team})
        assert done.code == 0, done
    text = (project.folder / FILE).read_text()
    assert SECRET not in text and "correct horse" not in text and "Bearer" not in text and "authorization" not in text.lower()
    assert "[redacted:openai-key]" in text and "[redacted:TEAM_API_KEY]" in text
    for other in ({}, {"TEAM_API_KEY": "another secret of another machine"}):
        done = project.pytest(env=other)
        assert (done.code, done.passed) == (0, 1), done


@pytest.mark.torture
def test_names_of_tests_and_parameters_have_files_of_their_own_and_a_file_may_be_named(project: Project) -> None:
    project.write(
        "tests/test_tour.py",
        """
        import pytest
        from agentflow.sync import generate_content

        class TestTour:
            @pytest.mark.recorded
            @pytest.mark.parametrize("town", ["Rome", "a/b:c", "x" * 300])
            def test_town(self, town):
                assert "answer to" in generate_content(town, model="openai:gpt-5-mini")

        @pytest.mark.recorded("shared.json")
        def test_shared():
            assert "answer to" in generate_content("shared", model="openai:gpt-5-mini")
        """,
    )
    assert record(project) == 4
    files = sorted(path.name for path in (project.folder / "tests/recordings/test_tour").iterdir())
    assert len(files) == 3 and files[0].startswith("TestTour.test_town[") and max(map(len, files)) < 160
    assert (project.folder / "tests/shared.json").exists()
    assert project.pytest().passed == 4


@pytest.mark.torture
def test_streamed_or_not_a_recording_is_the_same(project: Project) -> None:
    body = f"""
        import pytest
        from agentflow.sync import generate_content

        @pytest.mark.recorded
        @pytest.mark.parametrize("model", {MODELS})
        def test_tour(model):
            pieces = []
            text = generate_content("Hi", model=model, STREAM)
            assert "answer to" in text and PIECES
        """
    streamed = body.replace("STREAM", "on_text=pieces.append").replace(
        "PIECES", "''.join(pieces) == text and len(pieces) > 1"
    )
    plain = body.replace("STREAM", "").replace("PIECES", "pieces == []")
    project.write("tests/test_tour.py", streamed)
    assert record(project) == 3
    assert project.pytest().passed == 3
    project.write("tests/test_tour.py", plain)
    assert project.pytest().passed == 3
    for file in (project.folder / "tests/recordings/test_tour").iterdir():
        recorded = json.loads(file.read_text())["calls"][0]
        assert "stream" not in recorded["request"] and answer_to("Hi") in json.dumps(recorded["reply"])


@pytest.mark.torture
def test_error_replies_are_not_recorded(project: Project) -> None:
    project.write(
        "tests/test_tour.py",
        """
        import pytest
        from agentflow.sync import generate_content

        @pytest.mark.recorded
        def test_tour():
            assert generate_content("Hi", model="openai:gpt-5-mini", retry={"initial_delay": 0.001}) == "at last"
        """,
    )
    with Loopback(script=[{"status": 503, "body": {"error": {"message": "busy"}}}, {"text": "at last"}]) as server:
        assert project.pytest("--agentflow-record=once", env=server.environment).code == 0
    (call,) = json.loads((project.folder / FILE).read_text())["calls"]
    assert call["status"] == 200 and call["request_id"] == "req_2"
    assert project.pytest().passed == 1


# -- a run as a recording ------------------------------------------------------------------------------


def test_a_run_is_exported_as_a_recording_that_replays_it(tmp_path: Path) -> None:
    @workflow
    async def ask(ctx, names: list[str]) -> list[str]:
        return [await generate_content(f"Who is {name}? {SECRET}", model=model) for name, model in zip(names, MODELS, strict=True)]

    with FakeModel(lambda request: f"{request['text'][:11]}{SECRET}"):
        before = ask.run_sync(["Ada", "Bob", "Cyd"])
    (run,) = runs.list()
    file = tmp_path / "ask.json"
    assert export_recording(run.id, file) == 3
    assert SECRET not in file.read_text() and "usage" in file.read_text()
    with Recording(file) as recording:
        assert ask.options(fresh=True).run_sync(["Ada", "Bob", "Cyd"]) == [text.replace(SECRET, "[redacted:openai-key]") for text in before]
    assert recording.unused() == []
    with pytest.raises(UsageError, match="exists already"):
        export_recording(run.id, file)


def test_what_a_notebook_asked_is_exported_too_and_a_run_without_calls_is_refused(tmp_path: Path) -> None:
    from agentflow.sync import generate_content as ask

    with FakeModel([Truncated("Ro")]), pytest.raises(Truncated):
        ask("Which town?", model=MODELS[2])
    assert export_recording("scratch", tmp_path / "cells.json") == 1
    (call,) = json.loads((tmp_path / "cells.json").read_text())["calls"]
    assert call["endpoint"] == "messages" and call["reply"]["stop_reason"] == "max_tokens"
    with Recording(tmp_path / "cells.json"), pytest.raises(NotRecorded, match=r"-    .*Which town(.|\n)*\+    .*Which river"):
        ask("Which river?", model=MODELS[2])

    @workflow
    async def nothing(ctx) -> int:
        return 1

    nothing.run_sync()
    with pytest.raises(UsageError, match="no model calls"):
        export_recording(runs.list(workflow="nothing")[0].id, tmp_path / "none.json")


# -- cassettes ---------------------------------------------------------------------------------------------


def interaction(uri: str, request: object, reply: object, **headers: str) -> dict[str, object]:
    kept = {name.replace("_", "-"): [value] for name, value in headers.items()}
    text = reply if isinstance(reply, str) else json.dumps(reply)
    return {
        "request": {"method": "POST", "uri": uri, "body": json.dumps(request), "headers": {"content-type": ["application/json"]}},
        "response": {"status": {"code": 200, "message": "OK"}, "headers": kept, "body": {"string": text}},
    }


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_cassettes_of_vcrpy_work_as_they_are(project: Project, form: str) -> None:
    import yaml

    from agentflow.testing import reply_body, request_of, sse

    asked = request_of("/v1/chat/completions", {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]})
    streamed = {**asked["body"], "messages": [{"role": "user", "content": "Ho"}], "stream": True, "stream_options": {"include_usage": True}}
    uri = "https://api.openai.com/v1/chat/completions"
    cassette = {
        "interactions": [
            interaction(uri, asked["body"], reply_body(asked, "Hello!"), x_request_id="req_1"),
            interaction(uri, streamed, sse(asked, reply_body(asked, "Howdy!")), content_type="text/event-stream; charset=utf-8"),
        ],
        "version": 1,
    }
    text = yaml.safe_dump(cassette) if form == "yaml" else json.dumps(cassette)
    project.write(f"tests/cassettes/test_tour/test_tour.{form}", text)
    project.write(
        "tests/test_tour.py",
        f"""
        import pytest
        from agentflow.sync import generate_content

        @pytest.mark.recorded("cassettes/test_tour/test_tour.{form}")
        def test_tour():
            assert generate_content("Ho", model="openai-chat:gpt-4o-mini") == "Howdy!"
            assert generate_content("Hi", model="openai-chat:gpt-4o-mini") == "Hello!"
        """,
    )
    done = project.pytest()
    assert (done.code, done.passed) == (0, 1), done


def test_files_that_are_no_recordings_are_refused_plainly(tmp_path: Path) -> None:
    for name, text, words in [
        ("a.json", "{", "is not JSON"),
        ("b.json", '{"agentflow_recording": 99, "calls": []}', "no recording that this version reads"),
        ("c.json", '{"agentflow_recording": 1, "calls": [{"endpoint": "x"}]}', "call 1 lacks"),
        ("d.json", '{"interactions": 3}', "no list of interactions"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=words):
            Recording(tmp_path / name)
    with pytest.raises(UsageError, match="one of none, once, all"):
        Recording(tmp_path / "new.json", "new_episodes")
    (tmp_path / "e.json").write_text('{"interactions": []}')
    with pytest.raises(UsageError, match="only read here"):
        Recording(tmp_path / "e.json", "once")
