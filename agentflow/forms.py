"""Buttons and forms in notebooks, for people whom a run waits for; the one file that imports ipywidgets.

What is typed comes as text and is read as the schema has it (answers.py); what is decided goes through ``tasks``, where
the first decision wins. Nothing is evaluated or unpickled.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import orjson

from agentflow import answers, schema, tasks
from agentflow import cardparts as part
from agentflow.errors import AgentflowError, TaskClosed
from agentflow.kernels import acknowledging
from agentflow.records import UNSET, HumanTask

_WIDE = {"width": "32em"}
_forms: weakref.WeakSet[Form] = weakref.WeakSet()


def available() -> bool:
    """Whether ipywidgets is installed."""
    return find_spec("ipywidgets") is not None


def under(card: str, asked: Sequence[HumanTask]) -> dict[str, Any]:
    """The display of a card with a form for each task below it."""
    import ipywidgets

    return _bundle(ipywidgets.VBox([ipywidgets.HTML(card), *(Form(task).widget for task in asked)]))


def form(task: HumanTask, goes_on: Callable[[], bool]) -> dict[str, Any]:
    """The display of a form. ``goes_on``: whether the run still waits in this very process, and goes on by itself."""
    return _bundle(Form(task, goes_on).widget)


def closed(ident: str) -> None:
    """The task is not waited for any more: forms that are still open say what has become of it."""
    for each in list(_forms):
        if each.task.id == ident:
            each.look()


def _bundle(widget: Any) -> dict[str, Any]:
    made: dict[str, Any] = widget._repr_mimebundle_()
    return made


class Form:
    """Fields as the task's schema has them, a comment, and two buttons.

    Attributes: ``widget`` (to be displayed); ``task`` (as it was when the form was made).
    """

    def __init__(self, task: HumanTask, goes_on: Callable[[], bool] = lambda: False) -> None:
        import ipywidgets

        self.task = task
        self._goes_on = goes_on
        self._reads: dict[str, Callable[[], tuple[Any, str | None]]] = {}
        self._said = ipywidgets.HTML()
        self._comment = _typed(ipywidgets.Text, placeholder="comment (may be empty)")
        words = {"input": "Answer", "in_doubt": "It happened"}
        yes = words.get(task.type, "Approve" if task.schema is None else "Send")
        no = "It did not" if task.type == "in_doubt" else "Reject"
        self._yes = acknowledging(ipywidgets.Button(description=yes, button_style="success", icon="check"))
        self._no = acknowledging(ipywidgets.Button(description=no, button_style="danger", icon="times"))
        self._yes.on_click(lambda _: self._decide(True))
        self._no.on_click(lambda _: self._decide(False))
        rows = [widget for widget in self._rows() if widget is not None]
        asked = ipywidgets.HTML(part.card(self._asked()))
        self._open = ipywidgets.VBox([*rows, self._comment, ipywidgets.HBox([self._yes, self._no])])
        self.widget = ipywidgets.VBox([asked, self._open, self._said])
        self.widget._agentflow_form = self  # lives as long as what is displayed
        _forms.add(self)

    def _asked(self) -> Sequence[str]:
        task = self.task
        return [part.head(f"<b>{part.line(task.title or task.type)}</b>", part.code(task.id))]

    # -- fields --------------------------------------------------------------------------------

    def _rows(self) -> Sequence[Any]:
        task, form = self.task, self.task.schema
        if form is None:
            return [self._json()] if answers.asks_for_data(task) else []
        fields = form.get("properties")
        if not fields:
            return [self._field("answer", form, UNSET, required=True)]
        before = answers.filled(task, form)
        needed = [name for name in form.get("required", ()) if name not in before]
        return [
            self._field(name, field, before.get(name, field.get("default", UNSET)), required=name in needed)
            for name, field in fields.items()
        ]

    def _field(self, name: str, form: dict[str, Any], default: Any, *, required: bool) -> Any:
        """One field with its label; how it is read is kept under its name."""
        import ipywidgets

        form = dict(schema.referred(form, self.task.schema or {}))
        optional = not required and default in (UNSET, None)
        label = part.text(form.get("title") or name, 60) + (" (optional)" if optional else "")
        if form.get("type") == "boolean":
            given = default is not UNSET and bool(default)
            box = acknowledging(ipywidgets.Checkbox(value=given, description=label, indent=False))
            self._reads[name] = lambda: (box.value, None)
            return box
        if form.get("enum") and (required or default in form["enum"]):
            options = [(part.text(each, 80), each) for each in form["enum"]]
            chosen = default if default in form["enum"] else form["enum"][0]
            menu = acknowledging(ipywidgets.Dropdown(options=options, value=chosen))
            self._reads[name] = lambda: (menu.value, None)
            return _labelled(label, menu)
        kind = answers.kind(form)
        before, hint = _prefilled(default), kind
        if before is None:
            before, hint = "", "left as it is; what you type replaces it"
        long = kind == "JSON" or "\n" in before or len(before) > 80
        line = _typed(ipywidgets.Textarea if long else ipywidgets.Text, value=before, placeholder=hint)
        self._reads[name] = lambda: self._read(name, line.value, before, form, required)
        return _labelled(label, line)

    def _json(self) -> Any:
        """The field of a task that takes data and has no schema."""
        import ipywidgets

        line = _typed(ipywidgets.Textarea, placeholder="the answer (JSON, or else text)")
        self._reads["answer"] = lambda: (answers.parsed(line.value, line.value) if line.value.strip() else UNSET, None)
        return line

    def _read(self, name: str, typed: str, before: str, form: dict[str, Any], required: bool) -> tuple[Any, str | None]:
        """What a field says; UNSET where it was empty and is. One that was emptied is empty text, or nothing."""
        if typed.strip():
            value, wrong = answers.read(typed, form, name, self.task.schema)
            return (value, None) if wrong is None else answers.read(typed.strip(), form, name, self.task.schema)
        if not before and not required:
            return UNSET, None
        for empty in ("", None) if before else ():
            if schema.misfit(empty, form, name, self.task.schema) is None:
                return empty, None
        return UNSET, f"{name} needs an answer"

    # -- the decision ----------------------------------------------------------------------------

    def _decide(self, approved: bool) -> None:
        data: Any = UNSET
        try:
            if approved and self._reads:
                data, wrong = self._data()
                if wrong:
                    return self._say(wrong, "failed")
            comment, by = self._comment.value.strip() or None, answers.user()
            if not approved:
                done = tasks.reject(self.task.id, by=by, comment=comment)
            elif data is UNSET:
                done = tasks.approve(self.task.id, by=by, comment=comment)
            else:
                done = tasks.answer(self.task.id, data, by=by, comment=comment)
        except TaskClosed as error:
            self._close(str(error), "warn")
        except AgentflowError as error:  # an answer that does not fit, say: it may be mended
            self._say(str(error), "failed")
        else:
            after = "The run goes on." if self._goes_on() else "Run the cell again, and the run goes on."
            what = "" if data is UNSET else f": {part.shown_text(data, 500)}"
            self._close(f"{done.status} by {by or 'somebody'}{what}. {after}", done.status)

    def _data(self) -> tuple[Any, str | None]:
        """The answer, or why it is none: one value where the schema has no fields, else those that are filled in."""
        found: dict[str, Any] = {}
        for name, read in self._reads.items():
            value, wrong = read()
            if wrong:
                return UNSET, wrong
            if value is not UNSET:
                found[name] = value
        whole = self.task.schema is not None and self.task.schema.get("properties")
        return (found if whole else found.get("answer", UNSET)), None

    def look(self) -> None:
        """Say what has become of the task, if it was decided elsewhere."""
        if self._open.layout.display == "none":
            return
        now = tasks.get(self.task.id)
        if now.status != "open":
            by = f" by {now.decision.by or 'somebody'}" if now.decision is not None else ""
            self._close(f"{now.status}{by}.", now.status)

    def _say(self, text: str, kind: str) -> None:
        self._said.value = part.card([part.span(kind, text, 1000)])

    def _close(self, text: str, kind: str) -> None:
        self._open.layout.display = "none"
        for button in (self._yes, self._no):
            button.disabled = True
        self._say(text, kind)


def _typed(kind: Any, **options: Any) -> Any:
    """A field to type in. It says what it holds when it is left, so that no half of a word is taken for the answer."""
    return acknowledging(kind(layout=_WIDE, continuous_update=False, **options))


def _prefilled(default: Any) -> str | None:
    """A value as it stands in a field; None where it cannot stand there whole: it is long, or holds a secret."""
    if default is UNSET or default is None:
        return ""
    whole = default if isinstance(default, str) else orjson.dumps(default).decode()
    return whole if part.text(whole, 20_000) == whole else None


def _labelled(label: str, widget: Any) -> Any:
    import ipywidgets

    return ipywidgets.VBox([ipywidgets.Label(label), widget])
