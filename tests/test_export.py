"""A run in one file: complete, escaped, without secrets."""

from __future__ import annotations

import json
import os
from html.parser import HTMLParser

import pytest

import agentflow
from agentflow import Waiting, generate_content, human_task, runs, step, workflow
from agentflow.testing import FakeModel

KEY = "sk-proj-abcdefghij0123456789abcdefghij"
EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "opensesame-12345")

    @workflow("story")
    async def story(ctx, name: str) -> None:
        tries = []

        def flaky() -> dict:
            tries.append(1)
            if len(tries) == 1:
                raise ValueError(f"no luck with {KEY}")
            return {"password": "hunter2hunter2", "text": name, "token": "opensesame-12345"}

        await step(EVIL, flaky, retry={"max_attempts": 2, "initial_delay": 0})
        await step("hidden", lambda: "the real secret", secret=True)
        await generate_content(f"About {name} with {KEY}", model="openai:m", name="draft")
        await human_task("approve", assign_to="boss", data={"draft": EVIL, "key": KEY})

    with FakeModel([f"{EVIL} {KEY}"]), pytest.raises(Waiting):
        story.run_sync(EVIL)
    return runs.list()[0]


def test_json_holds_the_run_its_steps_calls_failures_and_tasks(run, tmp_path):
    path = run.export(tmp_path / "run.json")
    data = json.loads(path.read_text())
    assert data["format"] == 1 and data["run"]["id"] == run.id and data["run"]["status"] == "waiting"
    flaky, hidden, draft = data["steps"]
    assert flaky["output"]["text"] == EVIL and flaky["failures"][0]["attempt"] == 1
    assert hidden["output"] is None
    assert draft["calls"][0]["request"]["input"][0]["content"].startswith("About <script>")
    assert "output" in draft["calls"][0]["body"]
    assert data["tasks"][0]["status"] == "open" and data["tasks"][0]["assign_to"] == "boss"
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []


@pytest.mark.parametrize("name", ["run.json", "run.html"])
def test_secrets_are_in_no_export(run, tmp_path, name):
    text = run.export(tmp_path / name).read_text()
    for secret in (KEY, "hunter2hunter2", "opensesame-12345", "the real secret"):
        assert secret not in text
    assert "[redacted:" in text


def test_the_page_is_one_file_without_scripts_or_anything_fetched_and_escapes_all(run, tmp_path):
    text = run.export(str(tmp_path / "run.html")).read_text()
    tags: list[str] = []
    attributes: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)
            attributes.extend(name for name, _ in attrs)

    Reader().feed(text)
    assert {"html", "details", "pre", "style"} <= set(tags)
    assert not {"script", "img", "link", "iframe", "form", "base", "object"} & set(tags)
    assert not {name for name in attributes if name.startswith("on")} and not {"src", "href"} & set(attributes)
    assert "default-src 'none'" in text and run.id in text and "&lt;script&gt;" in text


def test_a_path_that_cannot_be_written_is_told_before_anything_is(run, tmp_path):
    for wrong in (tmp_path, tmp_path / "nowhere" / "run.json"):
        with pytest.raises(agentflow.UsageError, match="Name a file"):
            run.export(wrong)


async def test_a_fork_shows_the_calls_of_its_parent(run, tmp_path):
    made = run.fork()
    data = json.loads(made.export(tmp_path / "fork.json").read_text())
    assert data["run"]["parent"] == run.id
    assert [len(s["calls"]) for s in data["steps"]] == [0, 0, 1]
