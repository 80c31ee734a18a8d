"""A reply that did not validate is tried first when the type was edited: on each kind of server, and with tools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pydantic
import pytest

from agentflow import InvalidReply, Workflow, generate_content, otherform, parallel, workflow
from agentflow.providers import register
from tests.loopback import Loopback

MODELS = ["openai:gpt-4o-mini", "openai-chat:gpt-4o-mini", "anthropic:claude-haiku-4-5"]
IN_WORDS = ["chat-json:m", "chat-words:m", "responses-json:m", "messages-words:m"]


class Number(pydantic.BaseModel):
    n: int


class Word(pydantic.BaseModel):
    n: str


@pytest.fixture
def servers(loopback: Callable[..., Loopback]) -> Callable[..., Loopback]:
    def start(*script: Any, turns: list[Any] | None = None) -> Loopback:
        server = loopback(*script, turns=turns)
        register("chat-json", base_url=f"{server.url}/v1", structured="json")
        register("chat-words", base_url=f"{server.url}/v1", structured="prompt")
        register("responses-json", base_url=f"{server.url}/v1", api="responses", structured="json")
        register("messages-words", base_url=server.url, api="messages", structured="prompt")
        return server

    return start


def look(n: int) -> int:
    return 2 * n


def flow(model: str, kind: Any, prompt: Any = "Go", **options: Any) -> Workflow:
    @workflow("flow")
    async def flow(ctx: Any) -> Any:
        return await generate_content(prompt, model=model, output_type=kind, **{"reask": 0, **options})

    return flow


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("model", [*MODELS, *IN_WORDS])
async def test_the_paid_reply_is_tried_however_the_type_was_asked_for(
    servers: Callable[..., Loopback], model: str, system: str | None
) -> None:
    server = servers({"text": '{"n": "seven"}'})
    with pytest.raises(InvalidReply):
        await flow(model, Number, system=system).run()
    assert await flow(model, Word, system=system).run() == Word(n="seven")
    assert len(server.arrived) == 1


@pytest.mark.parametrize("model", [MODELS[0], IN_WORDS[0]])
async def test_another_system_message_is_another_question(servers: Callable[..., Loopback], model: str) -> None:
    server = servers({"text": '{"n": "seven"}'}, {"text": '{"n": "eight"}'})
    with pytest.raises(InvalidReply):
        await flow(model, Number, system="Be brief.").run()
    assert await flow(model, Word, system="Be kind.").run() == Word(n="eight")
    assert len(server.arrived) == 2


async def test_of_several_paid_replies_the_newest_that_fits_is_taken(servers: Callable[..., Loopback]) -> None:
    server = servers({"text": '{"m": 1}'}, {"text": '{"n": "seven"}'}, {"text": "nothing"})
    with pytest.raises(InvalidReply):
        await flow(MODELS[0], Number, reask=2).run()
    assert await flow(MODELS[0], Word, reask=2).run() == Word(n="seven")
    assert len(server.arrived) == 3


async def test_a_request_too_large_to_be_kept_beside_its_record_is_found_all_the_same(
    servers: Callable[..., Loopback],
) -> None:
    server = servers({"text": '{"n": "seven"}'}, {"text": '{"n": "eight"}'})
    several = [{"role": "user", "content": f"{at} " + "long " * 2000} for at in range(9)]
    for prompt in ("long " * 20_000, several):
        with pytest.raises(InvalidReply):
            await flow(MODELS[0], Number, prompt, sample=3).run()
    assert await flow(MODELS[0], Word, "long " * 20_000, sample=3).run() == Word(n="seven")
    assert await flow(MODELS[0], Word, several, sample=3).run() == Word(n="eight")
    assert len(server.arrived) == 2


@pytest.mark.parametrize("model", [*MODELS, IN_WORDS[1]])
async def test_a_conversation_with_tools_goes_on_with_all_that_was_paid(
    servers: Callable[..., Loopback], again: Callable[[], None], model: str
) -> None:
    server = servers(turns=[[["look", {"n": 1}]], [["look", {"n": 2}]], '{"n": "seven"}'])
    ran: list[int] = []

    def look(n: int) -> int:
        ran.append(n)
        return 2 * n

    with pytest.raises(InvalidReply):
        await flow(model, Number, tools=[look]).run()
    edited = flow(model, Word, tools=[look])
    assert await edited.run() == Word(n="seven")
    assert len(server.arrived) == 3 and ran == [1, 2]
    again()
    assert await edited.run() == Word(n="seven")
    assert await edited.options(rerun=["turn 3"]).run() == Word(n="seven")
    assert len(server.arrived) == 4 and ran == [1, 2], "its turns are found under the edited type from then on"


async def test_a_conversation_that_fails_again_asks_about_the_paid_reply(servers: Callable[..., Loopback]) -> None:
    server = servers(None, None, {"text": '{"n": "nine"}'}, turns=[[["look", {"n": 1}]], '{"m": 7}'])
    with pytest.raises(InvalidReply):
        await flow(MODELS[0], Number, tools=[look]).run()
    assert await flow(MODELS[0], Word, tools=[look], reask=1).run() == Word(n="nine")
    assert len(server.arrived) == 3, "one turn more"


async def test_many_new_questions_beside_many_records_look_at_each_record_once(
    servers: Callable[..., Loopback], monkeypatch: pytest.MonkeyPatch
) -> None:
    servers()
    looked = 0
    without_form = otherform.without_form

    def counted(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal looked
        looked += 1
        return without_form(request)

    def fan_out(word: str) -> Workflow:
        @workflow("fan")
        async def fan(ctx: Any) -> int:
            calls = [generate_content(f"{word} {n}", model=MODELS[0], output_type=Word) for n in range(60)]
            return len(await parallel(calls))

        return fan

    await fan_out("old").run()
    monkeypatch.setattr(otherform, "without_form", counted)
    await fan_out("new").run()
    assert 0 < looked <= 60 * 3
