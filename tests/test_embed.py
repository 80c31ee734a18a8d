"""``embed``: every text is paid for once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest

from agentflow import ModelError, UsageError, embed, parallel, sync, workflow
from agentflow.providers.common import use_transport
from agentflow.testing import FakeModel
from tests.programs import start_program

MODEL = "openai:text-embedding-3-small"


@workflow
async def index(ctx, texts: list[str]) -> list[list[float]]:
    return await embed(texts, model=MODEL)


def test_ten_texts_more_pay_for_ten_texts():
    thousand = [f"document {n}" for n in range(1000)]
    with FakeModel([]) as model:
        first = index.run_sync(thousand)
        second = index.run_sync([*thousand[:500], *(f"new {n}" for n in range(10)), *thousand[500:]])
    assert [len(asked) for asked in model.embedded] == [1000, 10]
    assert second[:500] + second[510:] == first


def test_a_replay_sends_nothing_and_gives_equal_vectors():
    with FakeModel([]) as model:
        once, twice = index.run_sync(["a", "b"]), index.run_sync(["a", "b"])
    assert once == twice and len(model.embedded) == 1
    assert index.runs()[0].cost > 0


def test_vectors_stand_in_the_order_of_the_texts_whatever_the_answers_order():
    def respond(request):
        texts = json.loads(request.content)["input"]
        data = [{"index": at, "embedding": [float(ord(text))]} for at, text in enumerate(texts)]
        return httpx2.Response(200, json={"data": data[::-1], "model": "m", "usage": {"prompt_tokens": 3}})

    before = use_transport(httpx2.MockTransport(respond))
    try:
        assert index.run_sync(["a", "b", "c"]) == [[97.0], [98.0], [99.0]]
    finally:
        use_transport(before)


def test_a_text_that_stands_twice_is_sent_once():
    with FakeModel([]) as model:
        one, other, again = index.run_sync(["a", "b", "a"])
    assert model.embedded == [["a", "b"]] and one == again != other


def test_branches_that_ask_for_the_same_text_at_the_same_moment_pay_for_it_once():
    @workflow
    async def fan_out(ctx, lists: list[list[str]]) -> list[list[list[float]]]:
        return await parallel([embed(texts, model=MODEL) for texts in lists])

    with FakeModel([], delay=0.02) as model:
        got = fan_out.run_sync([["a", "b"], ["b", "c"], ["c", "a"], ["a", "b"]])
    assert sorted(text for asked in model.embedded for text in asked) == ["a", "b", "c"]
    a, b, c = got[0][0], got[0][1], got[1][1]
    assert got == [[a, b], [b, c], [c, a], [a, b]]


def test_a_text_is_asked_for_by_another_branch_when_the_first_one_fails():
    posts = []

    async def respond(request):
        posts.append(json.loads(request.content)["input"])
        if len(posts) == 1:
            await asyncio.sleep(0.02)
            return httpx2.Response(400, json={"error": {"message": "no", "code": "bad"}})
        return httpx2.Response(200, json={"data": [{"index": 0, "embedding": [1.0]}], "model": "m"})

    @workflow
    async def both(ctx) -> list:
        return await parallel([embed(["a"], model=MODEL, name=name) for name in ("first", "second")], settle=True)

    before = use_transport(httpx2.MockTransport(respond))
    try:
        failed, got = both.run_sync()
    finally:
        use_transport(before)
    assert isinstance(failed, ModelError) and got == [[1.0]] and posts == [["a"], ["a"]]


def test_another_model_or_length_is_another_vector():
    @workflow
    async def shorter(ctx, dimensions: int | None, model: str) -> int:
        return len((await embed(["a"], model=model, dimensions=dimensions))[0])

    with FakeModel([]) as model:
        assert shorter.run_sync(None, MODEL) == 8
        assert shorter.run_sync(4, MODEL) == 4
        shorter.run_sync(None, "ollama:nomic-embed-text")
    assert len(model.embedded) == 3


def test_many_texts_are_sent_in_requests_that_the_provider_takes(monkeypatch):
    monkeypatch.setattr("agentflow.embeddings.MOST_TEXTS", 3)
    with FakeModel([]) as model:
        index.run_sync([str(n) for n in range(8)])
    assert [len(asked) for asked in model.embedded] == [3, 3, 2]


def test_requests_that_were_answered_before_a_kill_are_not_sent_again(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import os, signal, sys
from agentflow import embed, workflow
import agentflow.embeddings as module
from agentflow.testing import FakeModel
module.MOST_TEXTS = 2
die = len(sys.argv) > 1

@workflow("index")
async def index(ctx, n: int) -> int:
    return len(await embed([str(i) for i in range(n)], model={MODEL!r}))

class Dying(FakeModel):
    def _embedded(self, body):
        if die and len(self.embedded) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._embedded(body)

with Dying([]) as model:
    assert index.run_sync(6) == 6
print(model.embedded)
"""
    )
    env = {**os.environ, "AGENTFLOW_PATH": str(tmp_path / "journal")}
    killed = subprocess.run([sys.executable, program, "die"], env=env, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True, check=True)
    assert resumed.stdout.strip() == "[['4', '5']]"


PROGRAM = """
@workflow("index")
async def index(ctx, who: str) -> int:
    return len(await embed(["a", "b", *sys.argv[2:]], model="openai:text-embedding-3-small"))

print(index.run_sync(sys.argv[1]))
"""


class Held(BaseHTTPRequestHandler):
    """Answers a request for vectors when the test says so."""

    asked: list[list[str]] = []
    arrived = threading.Event()
    go = threading.Event()

    def log_message(self, format, *args):
        pass

    def do_POST(self):
        texts = json.loads(self.rfile.read(int(self.headers["content-length"])))["input"]
        self.asked.append(texts)
        self.arrived.set()
        self.go.wait(30)
        data = [{"index": at, "embedding": [0.5]} for at in range(len(texts))]
        body = json.dumps({"model": "text-embedding-3-small", "data": data, "usage": {"prompt_tokens": 2}}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_processes_that_want_the_same_text_at_the_same_moment_pay_for_it_once(tmp_path):
    Held.asked, Held.arrived, Held.go = [], threading.Event(), threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Held)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"OPENAI_BASE_URL": f"http://127.0.0.1:{server.server_address[1]}/v1", "OPENAI_API_KEY": "none"}
    try:
        first = start_program(PROGRAM, tmp_path, "first", env=env)
        assert Held.arrived.wait(60)
        second = start_program(PROGRAM, tmp_path, "second", "c", env=env)
        # It pays for what is its own alone, and says that it waits for the rest.
        assert "waits for vectors that another process has asked for" in second.stderr.readline()
        Held.go.set()
        assert [first.communicate(timeout=60)[0], second.communicate(timeout=60)[0]] == ["2\n", "3\n"]
    finally:
        Held.go.set()
        server.shutdown()
        server.server_close()
    assert Held.asked == [["a", "b"], ["c"]]


@pytest.mark.parametrize("status", [200, 400])
def test_a_failed_request_leaves_its_texts_to_others(journal, status):
    before = use_transport(httpx2.MockTransport(lambda request: httpx2.Response(status, json={"data": []})))
    try:
        with pytest.raises(ModelError):
            index.run_sync(["a"])
    finally:
        use_transport(before)
    assert list(journal.scan("ec/")) == []
    with FakeModel([]) as model:
        index.run_sync(["a"])
    assert model.embedded == [["a"]] and list(journal.scan("ec/")) == []


@pytest.mark.parametrize("answer", [{"data": []}, {"data": [{"index": 0, "embedding": "AAAA"}]}, "no JSON"])
def test_an_answer_that_does_not_fit_is_recorded_and_an_error(answer):
    posts = []

    def respond(request):
        posts.append(request)
        return httpx2.Response(200, content=answer if isinstance(answer, str) else json.dumps(answer))

    before = use_transport(httpx2.MockTransport(respond))
    try:
        with pytest.raises(ModelError, match="does not hold 1 vector"):
            index.run_sync(["a"])
    finally:
        use_transport(before)
    assert len(posts) == 1


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("text", {"model": MODEL}, "takes a list"),
        (["a", ""], {"model": MODEL}, r"texts\[1\]"),
        (["a", 5], {"model": MODEL}, r"texts\[1\]"),
        (["a"], {"model": None}, "needs model="),
        (["a"], {"model": "anthropic:claude-haiku-4-5"}, "has no embeddings"),
        (["a"], {"model": MODEL, "dimensions": 0}, "dimensions=0"),
        (["a"], {"model": MODEL, "timeout": 0}, "timeout=0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(texts, options, message):
    with FakeModel([]) as model, pytest.raises(UsageError, match=message):
        embed(texts, **options)
    assert not model.embedded


def test_no_texts_send_nothing():
    with FakeModel([]) as model:
        assert index.run_sync([]) == []
    assert not model.embedded


def test_plain_code_embeds_in_a_workflow_and_outside():
    @sync.workflow("plain-index")
    def plain(ctx, texts):
        return sync.parallel([lambda: sync.embed(texts, model=MODEL), lambda: sync.embed(texts, model=MODEL)])

    with FakeModel([]) as model:
        one, other = plain.run(["a", "b"])
        assert one == other == sync.embed(["a", "b"], model=MODEL) == plain.run(["a", "b"])[0]
        assert len(sync.embed(["c"], model=MODEL, dimensions=3)[0]) == 3
    assert model.embedded == [["a", "b"], ["c"]]
