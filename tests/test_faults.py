"""What providers and networks do wrong, and how many POSTs each costs: real SDKs against a server that counts."""

from __future__ import annotations

import asyncio
import email.utils
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from agentflow import Context, ModelError, Retry, generate_content, workflow
from agentflow.testing import reply_body, request_of, sse
from tests.loopback import answer_to

MODELS = ["openai:gpt-4o-mini", "openai-chat:gpt-4o-mini", "anthropic:claude-haiku-4-5"]
PATHS = {"openai": "/v1/responses", "openai-chat": "/v1/chat/completions", "anthropic": "/v1/messages"}
each_model = pytest.mark.parametrize("model_name", MODELS)
each_way = pytest.mark.parametrize("way", ["whole", "streamed"])


@pytest.fixture(autouse=True)
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses between attempts, noted and not slept."""
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float, result: Any = None) -> Any:
        if seconds > 0.2:
            pauses.append(seconds)
            seconds = 0
        return await sleep(seconds, result)

    monkeypatch.setattr("agentflow.drive.asyncio.sleep", noted)
    return pauses


def ask(model_name: str, way: str, **options: Any) -> Any:
    on_text = (lambda text: None) if way == "streamed" else None
    return generate_content("Hi", model=model_name, on_text=on_text, **options)


def fails(status: int, kind: str = "some_error", **headers: str) -> dict[str, Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return {"status": status, "headers": named, "body": {"error": {"type": kind, "code": kind, "message": "no"}}}


def answers(model_name: str, way: str, text: str = "a long enough answer, said once") -> dict[str, Any]:
    """A good answer, byte by byte, to be broken."""
    provider, _, model = model_name.partition(":")
    asked = request_of(PATHS[provider], {"model": model})
    body = reply_body(asked, text)
    if way == "streamed":
        return {"status": 200, "headers": {"content-type": "text/event-stream"}, "body": sse(asked, body)}
    return {"status": 200, "body": json.dumps(body)}


# -- asked again ---------------------------------------------------------------------------------


@each_way
@each_model
@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
async def test_a_transient_status_is_asked_again_once_per_failure(
    status: int, model_name: str, way: str, loopback: Any
) -> None:
    server = loopback(fails(status), fails(status))
    assert await ask(model_name, way) == answer_to("Hi")
    assert len(server.arrived) == 3 and [a["status"] for a in server.answered] == [status, status, 200]


@each_way
@each_model
async def test_three_attempts_are_all_there_are(model_name: str, way: str, loopback: Any) -> None:
    server = loopback(*[fails(500)] * 5)
    with pytest.raises(ModelError) as caught:
        await ask(model_name, way)
    assert caught.value.status == 500 and len(server.arrived) == 3


@each_way
@each_model
@pytest.mark.parametrize(
    "headers, least, most",
    [
        ({"retry_after": "7"}, 7, 7),
        ({"retry_after": "2.5"}, 2.5, 2.5),
        ({"retry_after_ms": "3500"}, 3.5, 3.5),
        ({"retry_after_ms": "4500", "retry_after": "9"}, 4.5, 4.5),
        ("date", 15, 20),
    ],
)
async def test_the_wait_the_server_asks_for_is_waited(
    headers: Any, least: float, most: float, model_name: str, way: str, loopback: Any, waited: list[float]
) -> None:
    if headers == "date":
        headers = {"retry_after": email.utils.formatdate(time.time() + 20, usegmt=True)}
    server = loopback(fails(429, **headers))
    assert await ask(model_name, way) == answer_to("Hi")
    assert len(server.arrived) == 2 and least <= max(waited) <= most


@each_model
async def test_a_success_that_carries_retry_after_is_not_waited_for(
    model_name: str, loopback: Any, waited: list[float]
) -> None:
    answer = answers(model_name, "whole")
    server = loopback({**answer, "headers": {"retry-after": "30"}})
    await ask(model_name, "whole")
    assert waited == [] and len(server.arrived) == 1


@each_way
@each_model
@pytest.mark.parametrize("status, said, posts", [(400, "true", 2), (429, "false", 1), (500, "false", 1)])
async def test_x_should_retry_has_the_last_word(
    status: int, said: str, posts: int, model_name: str, way: str, loopback: Any
) -> None:
    server = loopback(fails(status, x_should_retry=said))
    if posts == 1:
        with pytest.raises(ModelError):
            await ask(model_name, way)
    else:
        assert await ask(model_name, way) == answer_to("Hi")
    assert len(server.arrived) == posts


@each_way
@each_model
async def test_a_reset_before_the_body_is_asked_again(model_name: str, way: str, loopback: Any) -> None:
    server = loopback("reset")
    assert await ask(model_name, way) == answer_to("Hi")
    assert len(server.arrived) == 2


@each_way
@each_model
@pytest.mark.parametrize("then", ["close", "reset"])
async def test_a_connection_lost_in_the_body_is_asked_again(
    then: str, model_name: str, way: str, loopback: Any
) -> None:
    answer = answers(model_name, way)
    server = loopback({**answer, "cut": len(answer["body"]) // 2, "then": then})
    assert await ask(model_name, way) == answer_to("Hi")
    assert len(server.arrived) == 2


@each_way
@each_model
async def test_a_connection_lost_after_the_body_has_brought_the_answer(
    model_name: str, way: str, loopback: Any
) -> None:
    answer = answers(model_name, way, "whole")
    server = loopback({**answer, "cut": len(answer["body"])})
    assert await ask(model_name, way) == "whole"
    assert len(server.arrived) == 1


@each_way
@each_model
@pytest.mark.parametrize("where", ["before", "in"])
async def test_a_server_that_hangs_is_left_at_the_timeout_and_asked_again(
    where: str, model_name: str, way: str, loopback: Any
) -> None:
    answer = answers(model_name, way)
    fault = "hang" if where == "before" else {**answer, "cut": len(answer["body"]) // 2, "then": "hang"}
    server = loopback(fault)
    assert await ask(model_name, way, timeout=2) == answer_to("Hi")
    assert len(server.arrived) == 2


@each_model
async def test_json_cut_off_under_a_200_is_asked_again(model_name: str, loopback: Any) -> None:
    body = answers(model_name, "whole")["body"]
    server = loopback({"status": 200, "body": body[: len(body) // 2]})
    assert await ask(model_name, "whole") == answer_to("Hi")
    assert len(server.arrived) == 2


@each_model
async def test_a_page_instead_of_json_is_not_asked_again(model_name: str, loopback: Any) -> None:
    server = loopback({"status": 200, "headers": {"content-type": "text/html"}, "body": "<html>log in</html>"})
    with pytest.raises(ModelError, match="log in"):
        await ask(model_name, "whole")
    assert len(server.arrived) == 1


@each_model
async def test_a_stream_cut_off_cleanly_is_asked_again(model_name: str, loopback: Any) -> None:
    answer = answers(model_name, "streamed")
    events = answer["body"].split("\n\n")
    server = loopback({**answer, "body": "\n\n".join(events[: len(events) // 2]) + "\n\n"})
    assert await ask(model_name, "streamed") == answer_to("Hi")
    assert len(server.arrived) == 2


# -- not asked again -----------------------------------------------------------------------------


@each_way
@each_model
@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413, 422])
async def test_a_status_that_stays_is_one_post(status: int, model_name: str, way: str, loopback: Any) -> None:
    server = loopback(fails(status))
    with pytest.raises(ModelError) as caught:
        await ask(model_name, way)
    assert caught.value.status == status and len(server.arrived) == 1


@each_way
@each_model
async def test_an_exhausted_quota_is_one_post(model_name: str, way: str, loopback: Any) -> None:
    server = loopback(fails(429, "insufficient_quota", retry_after="1"))
    with pytest.raises(ModelError) as caught:
        await ask(model_name, way)
    assert caught.value.code == "insufficient_quota" and len(server.arrived) == 1


# -- across runs ---------------------------------------------------------------------------------


@each_way
@each_model
async def test_what_was_answered_after_faults_is_never_asked_for_again(
    model_name: str, way: str, loopback: Any, again: Callable[[], None]
) -> None:
    @workflow("faulty")
    async def flow(ctx: Context, n: int) -> str:
        answer: str = await ask(model_name, way)
        return answer

    server = loopback(fails(529), "reset")
    assert await flow.run(1) == answer_to("Hi")
    again()
    assert await flow.run(1) == answer_to("Hi")
    assert len(server.arrived) == 3 and flow.runs()[0].steps[0].attempts == 3


@each_way
async def test_an_own_retry_decides_how_many_posts_there_are(way: str, loopback: Any) -> None:
    server = loopback(*[fails(503)] * 9)
    with pytest.raises(ModelError):
        await ask(MODELS[0], way, retry=Retry(max_attempts=5, initial_delay=0))
    assert len(server.arrived) == 5
