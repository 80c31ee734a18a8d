"""Finding the workflow that a command line names: it imports the module that the person typed, and nothing else."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentflow.errors import UsageError
from agentflow.flow import Workflow
from agentflow.settings import settings


def workflow(target: str) -> Workflow[..., Any]:
    """The workflow that ``module:attribute`` or ``file.py:attribute`` stands for; the module's only one without ``:``.

    What the module prints goes to stderr. It may define workflows and configure; one that starts a run or a step
    while it is imported is refused, for nothing may be run or paid by looking.

    Raises:
        UsageError: there is no such module or workflow, or importing it fails.
    """
    name, colon, attribute = target.partition(":")
    if not name or (colon and not attribute):
        raise UsageError(f"{target!r}: write MODULE:ATTRIBUTE, such as app:triage or app.py:triage.")
    module = _import(name)
    if not colon:
        found = _workflows(module)
        if len(found) == 1:
            return next(iter(found.values()))
        raise UsageError(f"{target}: which of its workflows? {_listed(name, found)}")
    node: Any = module
    for part in attribute.split("."):
        node = getattr(node, part, None)
    if not isinstance(node, Workflow):
        what = "nothing" if node is None else f"a {type(node).__name__}"
        raise UsageError(f"{target}: is {what}, and no workflow. {_listed(name, _workflows(module))}")
    return node


def _import(name: str) -> Any:
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise UsageError(f"{name}: no such file.")
        place, name = path.resolve().parent, path.stem
    else:
        place = Path.cwd()
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))
    try:
        with looking():
            module = importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (name == exc.name or name.startswith(f"{exc.name}.")):
            raise UsageError(f"no module {exc.name!r} in {place} or on Python's path.") from exc
        raise UsageError(f"importing {name} failed: {exc}.") from exc
    except (Exception, SystemExit) as exc:
        raise UsageError(f"importing {name} failed: {type(exc).__name__}: {exc}") from exc
    if path.suffix == ".py" and Path(str(module.__file__)).resolve() != path.resolve():
        raise UsageError(f"{path}: Python finds {module.__file__} under the name {name!r}. Rename one of them.")
    return module


@contextlib.contextmanager
def looking() -> Iterator[None]:
    """Nothing is run: words of the user's code go to stderr, where they are in nobody's way."""
    before, settings.looking = settings.looking, True
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        settings.looking = before


def _workflows(module: Any) -> dict[str, Workflow[..., Any]]:
    return {name: value for name, value in vars(module).items() if isinstance(value, Workflow)}


def _listed(module: str, found: dict[str, Any]) -> str:
    if not found:
        return f"{module} holds no workflow."
    return f"{module} holds: {', '.join(f'{module}:{name}' for name in sorted(found))}."
