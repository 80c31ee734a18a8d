"""Compatible servers: found by name, asked with their own key, and never handed what is meant for others."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pydantic import BaseModel

from agentflow import (
    Context,
    ModelError,
    Reply,
    UnknownModel,
    UsageError,
    generate_content,
    ledger,
    providers,
    workflow,
)
from agentflow.models import Usage
from agentflow.providers import registry
from agentflow.providers.common import digest, use_transport
from agentflow.testing import FakeModel, reply_body, request_of
from tests.loopback import Loopback, answer_to

_VARIABLES = ("OPENROUTER_API_KEY", "OLLAMA_HOST", "OLLAMA_API_KEY", "VLLM_BASE_URL", "VLLM_API_KEY", "MINE_KEY")
NO_JSON_MODE = ("messages", "json")
_AZURE = ("AZURE_OPENAI_ENDPOINT", "AZURE_OPENAI_API_KEY", "OPENAI_API_VERSION", "AZURE_OPENAI_AD_TOKEN")


class City(BaseModel):
    name: str
    people: int


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*_VARIABLES, *_AZURE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as started:
        yield started


class Seen:
    """A transport that keeps the requests themselves, headers included."""

    def __init__(self) -> None:
        self.requests: list[httpx2.Request] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        asked = request_of(request.url.path, json.loads(request.content))
        return httpx2.Response(200, json=reply_body(asked, "fine"))


@pytest.fixture
def seen() -> Iterator[Seen]:
    kept = Seen()
    before = use_transport(httpx2.MockTransport(kept))
    yield kept
    use_transport(before)


@pytest.mark.parametrize(
    "api, base, path",
    [("chat", "/v1", "/v1/chat/completions"), ("responses", "/v1/", "/v1/responses"), ("messages", "", "/v1/messages")],
)
async def test_an_own_entry_is_asked_at_its_address_in_its_api(
    api: Any, base: str, path: str, server: Loopback
) -> None:
    providers.register("mine", base_url=server.url + base, api=api)
    assert await generate_content("Hi", model="mine:some/model:8b") == answer_to("Hi")
    (arrived,) = server.arrived
    assert (arrived["path"], arrived["model"]) == (path, "some/model:8b")


async def test_an_own_entry_is_paid_once_and_replayed_also_after_the_server_moved(
    server: Loopback, again: Callable[[], None]
) -> None:
    @workflow("asks-mine")
    async def flow(ctx: Context, topic: str) -> str:
        return await generate_content(topic, model="mine:m")

    providers.register("mine", base_url=server.url + "/v1")
    first = await flow.run("rivers")
    providers.register("mine", base_url="http://127.0.0.1:9/v1")
    again()
    assert await flow.run("rivers") == first
    assert len(server.arrived) == 1


@pytest.mark.parametrize(
    "value, path",
    [
        ("{url}", "/v1/chat/completions"),
        ("{place}", "/v1/chat/completions"),
        ("0.0.0.0:{port}", "/v1/chat/completions"),
        (":{port}", "/v1/chat/completions"),
        ("{url}/v1/", "/v1/chat/completions"),
        ("{url}/sub", "/sub/v1/chat/completions"),
    ],
)
async def test_ollama_is_found_where_ollama_host_says(
    value: str, path: str, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", value.format(url=server.url, place=server.url[7:], port=server.port))
    assert await generate_content("Hi", model="ollama:llama3.2:3b") == answer_to("Hi")
    assert [a["path"] for a in server.arrived] == [path] and server.arrived[0]["model"] == "llama3.2:3b"


async def test_vllm_is_found_where_vllm_base_url_says(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BASE_URL", server.url + "/v1")
    assert await generate_content("Hi", model="vllm:Qwen/Qwen3-8B") == answer_to("Hi")
    assert server.arrived[0]["path"] == "/v1/chat/completions"


@pytest.mark.parametrize(
    "version, path, header",
    [
        ("", "/openai/v1/chat/completions", ("authorization", "Bearer azure-secret")),
        (
            "2024-10-21",
            "/openai/deployments/my-gpt/chat/completions?api-version=2024-10-21",
            ("api-key", "azure-secret"),
        ),
    ],
)
async def test_azure_is_asked_by_its_v1_api_or_by_the_dated_one_that_is_set(
    version: str, path: str, header: tuple[str, str], seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", "https://mine.openai.azure.com/")
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "azure-secret")
    if version:
        monkeypatch.setenv("OPENAI_API_VERSION", version)
    assert await generate_content("Hi", model="azure:my-gpt") == "fine"
    (request,) = seen.requests
    assert str(request.url) == "https://mine.openai.azure.com" + path
    assert request.headers[header[0]] == header[1]


async def test_openrouter_is_asked_with_its_own_key(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENROUTER_API_KEY", "or-secret")
    await generate_content("Hi", model="openrouter:openai/gpt-4o")
    (request,) = seen.requests
    assert str(request.url) == "https://openrouter.ai/api/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer or-secret"
    assert json.loads(request.content)["model"] == "openai/gpt-4o"


@pytest.mark.parametrize("api", ["chat", "responses", "messages"])
async def test_nothing_meant_for_openai_or_anthropic_goes_to_another_server(
    api: Any, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "OPENAI_API_KEY",
        "OPENAI_ORG_ID",
        "OPENAI_PROJECT_ID",
        "OPENAI_ADMIN_KEY",
        "ANTHROPIC_API_KEY",
        "ANTHROPIC_AUTH_TOKEN",
    ):
        monkeypatch.setenv(name, "secret-of-others")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "x-own: secret-of-others")
    monkeypatch.setenv("ANTHROPIC_CUSTOM_HEADERS", "x-own: secret-of-others")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/secret-of-others")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:9/secret-of-others")
    providers.register("mine", base_url="http://mine.invalid/v1", key_env=None, api=api)
    await generate_content("Hi", model="mine:m")
    (request,) = seen.requests
    assert "secret-of-others" not in f"{request.url} {request.headers.raw}"


async def test_a_key_of_an_own_entry_is_sent_and_recorded_nowhere(
    server: Loopback, journal_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINE_KEY", "very-secret-word")
    providers.register("mine", base_url=server.url + "/v1", key_env="MINE_KEY")
    await generate_content("Hi", model="mine:m")
    written = b"".join(file.read_bytes() for file in journal_path.rglob("*") if file.is_file())
    assert answer_to("Hi").encode() in written and b"very-secret-word" not in written


@pytest.mark.parametrize(
    "model, variable",
    [("openrouter:openai/gpt-4o", "OPENROUTER_API_KEY"), ("mine:m", "MINE_KEY"), ("azure:m", "AZURE_OPENAI_API_KEY")],
)
async def test_a_missing_key_is_named_and_nothing_is_sent(
    model: str, variable: str, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    providers.register("mine", base_url=server.url + "/v1", key_env="MINE_KEY")
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", server.url)
    with pytest.raises(UsageError, match=f"set {variable} in the environment. Nothing was sent"):
        await generate_content("Hi", model=model)
    assert server.arrived == []


async def test_a_missing_address_is_named() -> None:
    with pytest.raises(UsageError, match="AZURE_OPENAI_ENDPOINT"):
        await generate_content("Hi", model="azure:m")


async def test_a_bad_address_in_the_environment_is_named_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BASE_URL", "http://me:hunter2@host/v1")
    with pytest.raises(UsageError, match="VLLM_BASE_URL") as caught:
        await generate_content("Hi", model="vllm:m")
    assert "hunter2" not in str(caught.value)


# -- what is asked -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("api", "structured"),
    [(a, s) for a in ("chat", "responses", "messages") for s in ("schema", "json", "prompt") if (a, s) != NO_JSON_MODE],
)
async def test_output_types_come_back_however_they_are_asked_for(api: Any, structured: Any) -> None:
    providers.register("mine", base_url="http://mine.invalid", api=api, structured=structured)
    with FakeModel([City(name="Oslo", people=3)]) as model:
        city = await generate_content("A city", model="mine:m", system="Be brief.", output_type=City)
    assert city == City(name="Oslo", people=3)
    text = json.dumps(model.calls[0]["body"])
    mode = "json_schema" if structured == "schema" else "json_object" if structured == "json" else None
    assert ("json_schema" in text, "json_object" in text) == (mode == "json_schema", mode == "json_object")
    assert ("fits this JSON schema" in text) == (structured != "schema")
    assert "Be brief." in text and model.calls[0]["provider"] == "mine"


@pytest.mark.parametrize("structured", ["json", "prompt"])
async def test_a_bare_value_is_asked_for_in_words_too(structured: Any) -> None:
    providers.register("mine", base_url="http://mine.invalid", structured=structured)
    with FakeModel(['{"value": [1, 2]}']):
        assert await generate_content("Numbers", model="mine:m", output_type=list[int]) == [1, 2]


async def test_a_compatible_server_is_told_max_tokens_and_azure_the_newer_name() -> None:
    with FakeModel(["a", "b"]) as model:
        await generate_content("Hi", model="ollama:m", max_tokens=5)
        await generate_content("Hi", model="azure:m", max_tokens=5)
    assert [sorted(c["body"]) for c in model.calls] == [
        ["max_tokens", "messages", "model"],
        ["max_completion_tokens", "messages", "model"],
    ]


async def test_the_same_question_to_two_providers_is_two_calls(again: Callable[[], None]) -> None:
    providers.register("one", base_url="http://one.invalid/v1")
    providers.register("two", base_url="http://two.invalid/v1")

    @workflow("both")
    async def flow(ctx: Context, n: int) -> list[str]:
        return [await generate_content("Hi", model=f"{name}:m") for name in ("one", "two")]

    with FakeModel(["first", "second"]) as model:
        assert await flow.run(1) == ["first", "second"]
        again()
        assert await flow.run(1) == ["first", "second"]
    assert [c["provider"] for c in model.calls] == ["one", "two"]
    assert digest(model.calls[0]["body"]) == digest(model.calls[1]["body"])


async def test_an_error_of_a_compatible_server_names_it() -> None:
    providers.register("mine", base_url="http://mine.invalid/v1")
    with FakeModel([404]), pytest.raises(ModelError, match="mine: 404"):
        await generate_content("Hi", model="mine:m")


# -- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, hint",
    [
        ("openruter:openai/gpt-4o", "openrouter:openai/gpt-4o"),
        ("antropic:x", "anthropic:x"),
        ("Ollama:x", "ollama:x"),
        ("mime:x", "mine:x"),
    ],
)
def test_an_unknown_provider_lists_what_is_known_and_suggests_the_nearest(model: str, hint: str) -> None:
    providers.register("mine", base_url="http://localhost:1/v1")
    with pytest.raises(UnknownModel) as caught:
        providers.resolve(model)
    assert f'Did you mean "{hint}"?' in str(caught.value)
    for name in ("openai", "openai-chat", "anthropic", "openrouter", "ollama", "vllm", "azure", "mine"):
        assert name in str(caught.value)


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    with pytest.raises(UnknownModel) as caught:
        providers.resolve("bedrock:x")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments, names",
    [
        ({"name": "openai"}, "name='openai'"),
        ({"name": "a:b"}, "name='a:b'"),
        ({"name": ""}, "name=''"),
        ({"name": 3}, "name=3"),
        ({"base_url": None}, "base_url="),
        ({"base_url": "localhost:8000"}, "base_url="),
        ({"base_url": "ftp://x/v1"}, "base_url="),
        ({"base_url": "http://"}, "base_url="),
        ({"base_url": "http://h:port/v1"}, "base_url="),
        ({"base_url": 7}, "base_url="),
        ({"base_url": "http://me:pw@h/v1"}, "password"),
        ({"base_url": "http://h/v1?key=1"}, "base_url="),
        ({"base_url_env": "A B"}, "base_url_env="),
        ({"key_env": "sk-not-a-name"}, "key_env="),
        ({"key_env": 3}, "key_env="),
        ({"api": "grpc"}, "api='grpc'"),
        ({"structured": "xml"}, "structured='xml'"),
        ({"api": "messages", "structured": "json"}, "structured='json'"),
        ({"prices": 3}, "prices=3"),
    ],
)
def test_a_registration_that_cannot_work_names_the_argument_and_registers_nothing(
    arguments: dict[str, Any], names: str
) -> None:
    before = providers.known()
    given = {"name": "mine", "base_url": "http://localhost:1/v1", **arguments}
    with pytest.raises(UsageError) as caught:
        providers.register(given.pop("name"), **given)
    assert names in str(caught.value) and "sk-not-a-name" not in str(caught.value) and "pw@" not in str(caught.value)
    assert providers.known() == before


def test_a_preset_can_be_replaced_and_put_back() -> None:
    providers.register("ollama", base_url="http://gpu:11434/v1", structured="json")
    assert registry._entries["ollama"].structured == "json"
    registry.forget("ollama")
    assert registry._entries["ollama"].structured == "schema"


# -- prices --------------------------------------------------------------------------------------


async def test_openrouter_names_find_published_prices() -> None:
    with FakeModel(["Hello"]):
        reply = await generate_content("Hi", model="openrouter:openai/gpt-4o", output_type=Reply)
    cost, _ = ledger.price(
        "openrouter", "openai/gpt-4o", Usage(**{"input_tokens": reply.usage.input_tokens, "output_tokens": 1})
    )
    assert reply.cost == cost and cost is not None and cost > 0


@pytest.mark.parametrize(
    "model", ["openrouter:no/such-model", "ollama:gpt-4o", "vllm:gpt-4o", "groq:llama-3.3-70b-versatile"]
)
async def test_what_has_no_published_price_is_unknown_and_not_zero(model: str) -> None:
    providers.register("groq", base_url="http://localhost:1/v1")
    with FakeModel(["Hello"]):
        assert (await generate_content("Hi", model=model, output_type=Reply)).cost is None


async def test_an_entry_may_name_whose_prices_hold_or_be_priced_by_hand() -> None:
    providers.register("mine", base_url="http://localhost:1/v1", prices="openai")
    ledger.set_price("own-model", input=1, output=1)
    with FakeModel(["Hello", "Hello"]):
        assert (await generate_content("Hi", model="mine:gpt-4o", output_type=Reply)).cost > Decimal(0)
        assert (await generate_content("Hi", model="mine:own-model", output_type=Reply)).cost > Decimal(0)


def test_the_registry_is_there_without_an_import_of_its_own_and_imports_no_sdk() -> None:
    code = (
        "import agentflow, sys\n"
        "agentflow.providers.register('mine', base_url='http://localhost:1/v1')\n"
        "print([name for name in ('openai', 'anthropic', 'pydantic', 'httpx2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
