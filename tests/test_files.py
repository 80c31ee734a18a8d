"""Files shown to a model: known by what is in them, sent in each API's own words, refused before anything is sent."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from agentflow import Context, Prompt, Reply, UsageError, generate_content, workflow
from agentflow.journal import Journal
from agentflow.testing import FakeModel
from tests.loopback import Loopback, answer_to

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 2
JPEG = b"\xff\xd8\xff\xe0" + b"j" * 40
GIF = b"GIF89a" + b"g" * 40
WEBP = b"RIFF\x10\x00\x00\x00WEBPVP8 " + b"w" * 40
PDF = b"%PDF-1.7\n" + b"p" * 40
MODELS = ["openai:gpt-4o-mini", "openai-chat:gpt-4o-mini", "anthropic:claude-haiku-4-5"]
each_model = pytest.mark.parametrize("model_name", MODELS)


def parts_of(call: Any) -> list[dict[str, Any]]:
    messages = call["body"]["input" if call["surface"] == "responses" else "messages"]
    content: list[dict[str, Any]] = messages[-1]["content"]
    return content


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.mark.parametrize(
    "content, media_type",
    [
        (PNG, "image/png"),
        (JPEG, "image/jpeg"),
        (GIF, "image/gif"),
        (b"GIF87a" + GIF, "image/gif"),
        (WEBP, "image/webp"),
    ],
)
@each_model
async def test_an_image_is_sent_in_the_apis_own_words(
    model_name: str, content: bytes, media_type: str, tmp_path: Path
) -> None:
    path = tmp_path / "a-lie.txt"
    path.write_bytes(content)
    with FakeModel(["a chart"]) as model:
        assert await generate_content("What is it?", model=model_name, files=[path]) == "a chart"
    url = f"data:{media_type};base64,{b64(content)}"
    image, question = parts_of(model.calls[0])
    assert (
        image
        == {
            "responses": {"type": "input_image", "image_url": url, "detail": "auto"},
            "chat": {"type": "image_url", "image_url": {"url": url}},
            "messages": {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": b64(content)}},
        }[model.calls[0]["surface"]]
    )
    assert question["text"] == "What is it?"


@each_model
async def test_a_pdf_is_sent_in_the_apis_own_words(model_name: str) -> None:
    with FakeModel(["a bill"]) as model:
        await generate_content("What is it?", model=model_name, files=[PDF])
    url = f"data:application/pdf;base64,{b64(PDF)}"
    source = {"type": "base64", "media_type": "application/pdf", "data": b64(PDF)}
    assert (
        parts_of(model.calls[0])[0]
        == {
            "responses": {"type": "input_file", "filename": "file-1.pdf", "file_data": url},
            "chat": {"type": "file", "file": {"filename": "file-1.pdf", "file_data": url}},
            "messages": {"type": "document", "source": source},
        }[model.calls[0]["surface"]]
    )


@each_model
async def test_a_text_file_is_shown_as_text_without_its_byte_order_mark(model_name: str, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_bytes(b"\xef\xbb\xbf" + "Grüße </file>".encode())
    with FakeModel(["ok"]) as model:
        await generate_content("Sum up", model=model_name, files=[str(path)])
    shown = '<file number="1">\nGrüße <\\/file>\n</file>'
    assert (
        parts_of(model.calls[0])[0]
        == {
            "responses": {"type": "input_text", "text": shown},
            "chat": {"type": "text", "text": shown},
            "messages": {
                "type": "document",
                "source": {"type": "text", "media_type": "text/plain", "data": "Grüße </file>"},
            },
        }[model.calls[0]["surface"]]
    )


@each_model
async def test_files_are_sent_in_order_before_the_words_through_the_real_sdk(
    model_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Loopback() as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        reply = await generate_content("Which?", model=model_name, files=[PNG, PDF, b"words"], output_type=Reply)
    assert len(server.arrived) == 1 and server.arrived[0]["text"].endswith("Which?")
    assert reply.text == answer_to(server.arrived[0]["text"])
    content = next(m["content"] for m in reply.messages if m.get("role") == "user")
    assert [part["type"] for part in content] == {
        "openai": ["input_image", "input_file", "input_text", "input_text"],
        "openai-chat": ["image_url", "file", "text", "text"],
        "anthropic": ["image", "document", "document", "text"],
    }[model_name.partition(":")[0]]


@each_model
async def test_a_conversation_with_files_goes_on(model_name: str) -> None:
    with FakeModel(["a chart", "blue"]) as model:
        first = await generate_content("What?", model=model_name, files=[PNG], output_type=Reply)
        await generate_content([*first.messages, {"role": "user", "content": "Colour?"}], model=model_name)
    assert b64(PNG) in str(model.calls[1]["body"])


async def test_files_go_with_a_prompt_file_and_with_data_and_a_type() -> None:
    class Look(BaseModel):
        what: str

    with FakeModel([Look(what="cat")]) as model:
        prompt = Prompt(text="What?", name="look", system=None, model=None)
        got = await generate_content(prompt, model=MODELS[0], data={"a": 1}, files=[PNG], output_type=Look)
    assert got == Look(what="cat") and '"a": 1' in model.calls[0]["text"].replace('"a":1', '"a": 1')


# -- identity ------------------------------------------------------------------------------------


@each_model
async def test_a_renamed_file_costs_nothing_and_an_edited_one_asks_again(
    model_name: str, tmp_path: Path, again: Callable[[], None]
) -> None:
    @workflow("looks")
    async def flow(ctx: Context, n: int) -> str:
        (path,) = tmp_path.glob("*.any")
        return await generate_content("What?", model=model_name, files=[path])

    (tmp_path / "one.any").write_bytes(PNG)
    with FakeModel(["first", "second"]) as model:
        assert await flow.run(1) == "first"
        (tmp_path / "one.any").rename(tmp_path / "two.any")
        again()
        assert await flow.run(1) == "first"
        assert len(model.calls) == 1
        (tmp_path / "two.any").write_bytes(PNG + b"!")
        again()
        assert await flow.options(fresh=True).run(1) == "second"


async def test_bytes_and_a_path_of_the_same_content_are_the_same_call(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(PNG)
    with FakeModel(["one"]) as model:

        @workflow("same")
        async def flow(ctx: Context, how: int) -> str:
            return await generate_content(
                "What?", model=MODELS[0], files=[PNG if kind["bytes"] else tmp_path / "x.png"]
            )

        kind = {"bytes": True}
        assert await flow.run(1) == "one"
        kind["bytes"] = False
        assert await flow.run(1) == "one"
    assert len(model.calls) == 1


async def test_the_order_of_files_counts() -> None:
    with FakeModel(["one", "two"]) as model:
        await generate_content("What?", model=MODELS[0], files=[PNG, PDF])
        await generate_content("What?", model=MODELS[0], files=[PDF, PNG])
    assert len(model.calls) == 2


@each_model
async def test_a_file_is_not_stored_with_every_reply(model_name: str, journal: Journal, journal_path: Path) -> None:
    big = PNG + bytes(range(256)) * 4000
    with FakeModel(["not json", '{"value": 1}']) as model:
        assert await generate_content("How many?", model=model_name, files=[big, PDF * 20], output_type=int) == 1
    assert len(model.calls) == 2 and b64(big) in str(model.calls[1]["body"])
    texts = [text for _, text in journal.scan("")]
    assert sum(map(len, texts)) < 60_000
    replies = [text for key, text in journal.scan("m/")]
    assert len(replies) == 2 and all("sha256:" in text for text in replies)
    assert all(file.stat().st_size < 2_000_000 for file in journal_path.rglob("*") if file.is_file())


# -- refused before anything is sent -------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("missing.png", None, "files\\[0\\].*missing.png: there is no such file"),
        ("folder", ..., "folder is a directory"),
        ("empty.png", b"", "is empty"),
        ("song.mp3", b"ID3\x04\x00\xff\xfe", "of a type that cannot be shown: png, jpeg"),
        ("table.xlsx", b"PK\x03\x04\x00\x00", "of a type that cannot be shown"),
        ("old.txt", "Grüße".encode("latin-1"), "not text in UTF-8 \\(byte 2\\)"),
        ("wide.csv", "a,b".encode("utf-16"), "not text in UTF-8"),
        ("nul.txt", b"a\0b", "of a type that cannot be shown"),
        ("fake.png", b"\x00\x01not an image\xff", "of a type that cannot be shown"),
        ("tiff.tif", b"II*\x00\x10\x00", "of a type that cannot be shown"),
    ],
)
async def test_what_cannot_be_shown_is_an_error_before_anything_is_sent(
    name: str, content: Any, says: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is ...:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with FakeModel([]) as model, pytest.raises(UsageError, match=says) as caught:
        await generate_content("What?", model=MODELS[0], files=[path])
    assert "Nothing was sent" in str(caught.value) and model.calls == []


@pytest.mark.parametrize(
    "files, says",
    [
        ("a.png", "write a list"),
        (b"a", "write a list"),
        (Path("a.png"), "write a list"),
        (3, "write a list"),
        ([3], "files\\[0\\] is a int: write a path, or bytes"),
        ([PNG, None], "files\\[1\\] is a NoneType"),
        (["a\0b"], "files\\[0\\].*cannot be read"),
        ([b""], "files\\[0\\] is empty"),
    ],
)
async def test_what_is_no_list_of_files_is_an_error(files: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        await generate_content("What?", model=MODELS[0], files=files)
