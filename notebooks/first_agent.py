# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A first agent
#
# You ask a model to read a letter, write an answer and find a subject line. You change a prompt, approve the answer,
# and keep what the model said for a test.
#
# Everything that finishes is recorded beside your project, in `.agentflow/`. So run cells again, in any order, and
# restart the kernel whenever you like: **no answer is paid for twice.** (A call that was cut off has brought no answer
# yet; it is made again.) Try it as you read.

# %%
from pathlib import Path

from agentflow import Waiting, configure, generate_content, human_task, step, tasks, workflow
from agentflow.ledger import set_price
from agentflow.testing import FakeModel

# %% [markdown]
# ## A model that costs nothing
#
# So that this notebook runs without a key and without a network, a *scripted* model answers: a dict from words in the
# question to the reply. Everything else is real, the provider's own client included.
#
# To ask a real model, set `OPENAI_API_KEY`, write `REAL = True`, and restart the kernel. Nothing else changes.

# %%
REAL = False

scripted = FakeModel(
    {
        "three words": "Nothing is lost.",
        "What does this customer want": "- her money back for order 1042\n- to know why the parcel was late",
        "a polite answer": "Dear Ada, your money is on its way. The parcel was held up in a storm. Kind regards",
        "one friendly sentence": "Dear Ada, your money is on its way, and sorry about that storm!",
        "a subject line": "Your order 1042",
    }
)
if REAL:
    configure(model="openai:gpt-5-mini")
else:
    scripted.start()
    configure(model="openai:scripted")
    set_price("scripted", input="0.25", output="2")  # dollars for a million tokens, so that there is a bill

# %% [markdown]
# ## One question
#
# `generate_content` asks a model. In a notebook you can simply `await` it.
#
# *Look at* the number below the answer: it counts the calls that the scripted model has got since it was started. Run
# the cell again, and it stays as it is.

# %%
print(await generate_content("Describe a good notebook in three words."))
print(len(scripted.calls), "calls so far")

# %% [markdown]
# ## A chain of questions
#
# Each answer goes into the next question. A `@workflow` holds them together: it has a name, its runs can be looked at
# later, and while it runs a card shows what it does.

# %%
letter = "Hello, my parcel (order 1042) came two weeks late. I want my money back! And what happened? Ada"


@workflow("answer-letter")
async def answer_letter(ctx, letter: str) -> dict[str, str]:
    wishes = await generate_content("What does this customer want?", data=letter, name="wishes")
    answer = await generate_content("Write a polite answer.", data=wishes, name="answer")
    subject = await generate_content("Write a subject line for this mail.", data=answer, name="subject")
    return {"subject": subject, "text": answer}


mail = await answer_letter.run(letter)
print(mail["text"])
print(len(scripted.calls), "calls so far")


# %% [markdown]
# *Look at* the card: 3 steps, when they ran, and what they cost. **Run the cell again**: 3 steps, all of them
# *replayed*. The same letter is the same run, and it knows its answers.
#
# ## Another prompt
#
# The answer is too stiff. The next cell is the same workflow with one prompt changed. Before it runs, `plan` tells
# what the change means, and spends nothing.

# %%
@workflow("answer-letter")
async def answer_letter(ctx, letter: str) -> dict[str, str]:
    wishes = await generate_content("What does this customer want?", data=letter, name="wishes")
    answer = await generate_content("Write an answer in one friendly sentence.", data=wishes, name="answer")
    subject = await generate_content("Write a subject line for this mail.", data=answer, name="subject")
    return {"subject": subject, "text": answer}


await answer_letter.plan(letter)

# %%
mail = await answer_letter.run(letter)
print(mail["text"])
print(len(scripted.calls), "calls so far")


# %% [markdown]
# *Look at* what ran: `wishes` was replayed. `answer` ran because its prompt is another one, and `subject` because it is
# shown another answer. Nothing else was asked.
#
# ## A person has the last word
#
# Nobody should get this mail before you have read it. `human_task` asks a person. It does not block the cell: the run
# *waits*, and you can shut the computer down.

# %%
@workflow("send-mail")
async def send_mail(ctx, mail: dict[str, str]) -> str:
    decision = await human_task("approve", assign_to="you", title="Send this mail?", data=mail)
    if not decision:
        return f"not sent: {decision.comment}"
    return await step("send", lambda: f"sent: {mail['subject']}")


try:
    print(await send_mail.run(mail))
except Waiting as waiting:
    print(waiting)

# %% [markdown]
# *Look at* the card: it shows what you would approve, and what to type. With ipywidgets installed there are buttons,
# too. The id `t-...` is the task's; here it is again with its data. You approve that and nothing else: another mail
# would be another task.

# %%
for task in tasks.list():
    print(task.id, task.title, task.data)

# %% [markdown]
# Give your approval (or `tasks.reject(task.id, by="you", comment="too short")`), unless you have pressed the button. In
# a terminal, `agentflow tasks approve t-...` does the same.

# %%
for task in tasks.list():
    tasks.approve(task.id, by="you")

# %% [markdown]
# Ask the run again, and it goes on where it was. A second time it replays: the mail is sent once.

# %%
print(await send_mail.run(mail))

# %% [markdown]
# ## Keep the answers for a test
#
# A run can be written as a *recording*: one readable file with each question and its reply, secrets masked.

# %%
(run,) = answer_letter.runs()
recording = Path("recordings/first_agent.json")
recording.parent.mkdir(exist_ok=True)
recording.unlink(missing_ok=True)  # an older one is never written over
print(run.export(recording, recording=True), "holds what", run.id, "was told")

# %% [markdown]
# A test plays it without a model and without a network. Move the workflow into a file `letters.py`, with the
# `configure(model=...)` that it ran under, and write beside it:
#
# ```python
# import pytest
# from letters import answer_letter
#
# @pytest.mark.recorded("recordings/first_agent.json")
# def test_answer():
#     assert answer_letter.run_sync("Hello, my parcel ...")["subject"] == "Your order 1042"
# ```
#
# What you asked outside workflows, as in the first question above, is exported with
# `agentflow runs export scratch --recording FILE`.
#
# ## Now break it
#
# Choose *Restart kernel and run all cells*. *Look at* the counts: 0 calls. Every card says *replayed*, the approval
# still holds, and no mail is sent again. What a cell ends with is shown as a card: try `run`, `run.steps`,
# `answer_letter.runs()` or `tasks.list(status=None)`. To begin from nothing, delete the folder `.agentflow/`.
