"""The model of the demo: a script below the real provider SDK, so no key and no network is needed."""

from __future__ import annotations

from agentflow import configure
from agentflow.demo import shop
from agentflow.ledger import set_price
from agentflow.models import Request
from agentflow.testing import FakeModel

NAME = "openai:scripted"
PRICE = {"input": "1.25", "output": "10"}
"""Dollars per million tokens: what a mid-sized model costs."""


def scripted() -> FakeModel:
    """Answers every order of the file; each answer is counted in the shop's book as paid."""
    configure(model=NAME)
    set_price(NAME, PRICE["input"], PRICE["output"])
    return FakeModel(answer)


def answer(request: Request) -> dict[str, str]:
    shop.note("model", "asked")
    if "two countries" in request["text"]:
        return {"risk": "high", "reason": "Gift cards, express, card and address in two countries."}
    if "New customer" in request["text"]:
        return {"risk": "low", "reason": "A company's usual purchase, though it is new here."}
    return {"risk": "low", "reason": "A small order like many others."}
