"""Tokens are counted before a call, with the word for how sure that is, and never by waiting for a download."""

from __future__ import annotations

import base64
import hashlib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tiktoken.load
import tiktoken.registry
from tiktoken_ext import openai_public

from agentflow import generate_content, ledger, tokens, workflow
from agentflow.generate import prepare
from agentflow.testing import FakeModel

URL = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"
RANKS = b"\n".join(base64.b64encode(bytes([n])) + b" %d" % n for n in range(256)) + b"\n"  # a token for each byte


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """What tiktoken would have downloaded; its cache is an empty directory."""
    asked: list[str] = []

    def read_file(place: str) -> bytes:
        if "://" not in place:
            return Path(place).read_bytes()
        asked.append(place)
        raise OSError(f"download of {place}")

    monkeypatch.setattr(tiktoken.load, "read_file", read_file)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tokens, "_loaded", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    yield asked
    assert asked == []


def cached(folder: Path) -> Path:
    return folder / hashlib.sha1(URL.encode()).hexdigest()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A tiktoken whose o200k_base is a small file: where that would lie in the cache."""
    sha256 = hashlib.sha256(RANKS).hexdigest()
    source = f"""
def o200k_base():
    ranks = load_tiktoken_bpe({URL!r}, expected_hash={sha256!r})
    return {{"name": "o200k_base", "pat_str": r"(?s).+", "mergeable_ranks": ranks, "special_tokens": {{}}}}
"""
    space: dict[str, Any] = {"load_tiktoken_bpe": tiktoken.load.load_tiktoken_bpe}
    exec(source, space)
    monkeypatch.setattr(openai_public, "o200k_base", space["o200k_base"])
    monkeypatch.setattr(tiktoken.registry, "ENCODING_CONSTRUCTORS", {"o200k_base": space["o200k_base"]})
    monkeypatch.setitem(tokens._FILES, "o200k_base", (URL, sha256))
    return cached(tmp_path / "cache")


def body(model: str, prompt: Any = "Hello there!", **more: Any) -> tuple[str, str, dict[str, Any]]:
    call = prepare(prompt, model=model, **more)
    return call.request["provider"], call.request["model"], call.request["body"]


async def counted(model: str, *args: Any, **more: Any) -> tokens.Count:
    provider, name, made = body(model, *args, **more)
    await tokens.warm(provider, name)
    return tokens.count(provider, name, made)


# -- with and without a tokenizer --------------------------------------------------------------------------------------


async def test_without_a_file_on_this_machine_tokens_are_estimated() -> None:
    count = await counted("openai:gpt-4o-mini", "x" * 3000)
    assert count.how == "estimated" and 1000 < count.tokens < 1040
    assert str(count) == f"{count.tokens:,} input tokens (estimated)"


async def test_with_the_file_in_the_cache_the_count_of_a_known_model_is_exact(small: Path) -> None:
    small.write_bytes(RANKS)
    assert await counted("openai:gpt-4o-mini", "Hello there!") == (12 + 4 + 3, "exact")
    assert await counted("openai-chat:gpt-4o-mini", "Hello there!", system="Be kind.") == (20 + 8 + 3, "exact")


async def test_a_model_that_tiktoken_does_not_know_is_counted_as_its_makers_newest(small: Path) -> None:
    small.write_bytes(RANKS)
    assert await counted("openai:o9-large", "Hello there!") == (12 + 4 + 3, "assumed")


async def test_a_schema_is_counted_as_text_and_said_to_be_assumed(small: Path) -> None:
    small.write_bytes(RANKS)
    plain = await counted("openai:gpt-4o-mini", "Hello there!")
    formed = await counted("openai:gpt-4o-mini", "Hello there!", output_type=list[int])
    assert formed.how == "assumed" and formed.tokens > plain.tokens + 50


async def test_a_model_whose_tokenizer_is_not_public_is_estimated(small: Path) -> None:
    small.write_bytes(RANKS)
    assert (await counted("anthropic:claude-haiku-4-5", "x" * 3000)).how == "estimated"


async def test_a_file_of_other_content_is_neither_used_nor_removed(small: Path, no_download: list[str]) -> None:
    small.write_bytes(RANKS[:-9])
    assert (await counted("openai:gpt-4o-mini")).how == "estimated"
    assert small.read_bytes() == RANKS[:-9]


async def test_another_version_of_tiktoken_that_wants_another_file_is_not_asked(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = f"{URL}2"
    (small.parent / hashlib.sha1(other.encode()).hexdigest()).write_bytes(RANKS)
    monkeypatch.setitem(tokens._FILES, "o200k_base", (other, hashlib.sha256(RANKS).hexdigest()))
    assert (await counted("openai:gpt-4o-mini")).how == "estimated"


@pytest.mark.parametrize("place", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", "temporary", "off"])
async def test_the_cache_is_looked_for_where_tiktoken_does(
    small: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data-gym-cache"
    folder.mkdir()
    cached(folder).write_bytes(RANKS)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    if place == "temporary":
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    else:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR" if place == "off" else place, "" if place == "off" else str(folder))
    assert (await counted("openai:gpt-4o-mini")).how == ("estimated" if place == "off" else "exact")


async def test_an_encoding_that_the_program_has_loaded_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {bytes([n]): n for n in range(256)}
    loaded = tiktoken.Encoding("o200k_base", pat_str="(?s).+", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "o200k_base", loaded)
    assert await counted("openai:gpt-4o-mini", "<|endoftext|>") == (13 + 4 + 3, "exact")


def test_the_files_are_those_of_the_installed_tiktoken() -> None:
    for name, (url, sha256) in tokens._FILES.items():
        made: types.FunctionType = getattr(openai_public, name)
        assert {url, sha256} <= set(made.__code__.co_consts)


# -- files -------------------------------------------------------------------------------------------------------------


PNG = b"\x89PNG\r\n\x1a\n" + bytes(60_000)


@pytest.mark.parametrize("model", ["openai:gpt-4o-mini", "openai-chat:gpt-4o-mini", "anthropic:claude-haiku-4-5"])
async def test_an_image_is_not_counted_as_the_text_that_carries_it(model: str, small: Path) -> None:
    small.write_bytes(RANKS)
    count = await counted(model, "What is this?", files=[PNG])
    assert count.how == "estimated" and tokens.IMAGE_TOKENS < count.tokens < tokens.IMAGE_TOKENS + 200


@pytest.mark.parametrize("model", ["openai:gpt-4o-mini", "anthropic:claude-haiku-4-5"])
async def test_a_longer_pdf_counts_more(model: str) -> None:
    short, long = [await counted(model, files=[b"%PDF-1.7" + bytes(size)]) for size in (1_000, 100_000)]
    assert long.tokens > short.tokens + 20_000


# -- where counts are shown --------------------------------------------------------------------------------------------


async def test_a_plan_estimates_new_calls_by_their_tokens_and_changed_ones_by_the_answer_before(
    again: Callable[[], None],
) -> None:
    ledger.set_price("priced", 100, 1000)
    asked = ["short"]

    @workflow("planned")
    async def planned(ctx: Any) -> str:
        return await generate_content(asked[0], model="openai:priced", name="draft")

    plan = await planned.plan()
    assert plan.steps[0].tokens is not None and plan.steps[0].tokens.how == "estimated"
    assumed = (plan.steps[0].tokens.tokens * 100 + 2_000 * 1000) / 1_000_000
    assert plan.dollars is not None and float(plan.dollars) == pytest.approx(assumed)
    assert f"{plan.steps[0].tokens} · costs about $2.0" in " ".join(str(plan).split())
    with FakeModel(["y" * 400]):
        await planned.options(run_id="r").run()
    again()
    asked[0] = "short, but in other words"
    plan = await planned.options(run_id="r").plan()
    assert plan.steps[0].state == "changed" and plan.steps[0].tokens is not None
    cost = (plan.steps[0].tokens.tokens * 100 + 100 * 1000) / 1_000_000
    assert plan.dollars is not None and float(plan.dollars) == pytest.approx(cost)
