"""The user's workflows, imported because the user names them: ``app:flow``, ``path/to/app.py:flow``, ``app``.

A record never says what to import. What a module prints while it is imported goes to stderr: stdout is for data.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from agentflow.errors import UsageError
from agentflow.flow import Workflow
from agentflow.handles import workflows
from agentflow.settings import settings

Flow = Workflow[..., Any]
_FORMS = "write MODULE:ATTRIBUTE, such as app:triage or app.py:triage"


def load(targets: Iterable[str]) -> dict[str, Flow]:
    """Workflows by their names, to be run.

    Args:
        targets: each ``module:attribute`` (a workflow, or a list, tuple, set or dict of them; dots go on inside) or
            ``module`` (all that it defines). A module is named as in an import, and looked for in the working
            directory first, as ``python -m`` does; or it is a file: ``app.py``, ``path/to/app.py``.

    Raises:
        UsageError: there is no such module or attribute, it fails, there is no workflow in it, or two different
            workflows have one name.
    """
    found: dict[str, Flow] = {}
    for target in targets:
        module, node = _resolved(target)
        for each in _members(node, target, module):
            other = found.setdefault(each.name, each)
            if other is not each and other.fn is not each.fn:
                raise UsageError(
                    f"{target}: there are two workflows named {each.name!r}, in {other.fn.__module__} and "
                    f'{each.fn.__module__}. Rename one of them: @workflow("...").'
                )
    return found


def workflow(target: str) -> Flow:
    """The workflow that ``module:attribute`` stands for, to be looked at; the module's only one without ``:``.

    The module may define workflows and configure; one that starts a run or a step while it is imported is refused, for
    nothing may be run or paid by looking.

    Raises:
        UsageError: as for ``load``, or it is several workflows.
    """
    with looking():
        module, node = _resolved(target)
    found = _members(node, target, module)
    if len(found) > 1:
        raise UsageError(f"{target}: which of its workflows? {_listed(target, module)}")
    return found[0]


@contextlib.contextmanager
def looking() -> Iterator[None]:
    """Nothing is run: words of the user's code go to stderr, where they are in nobody's way."""
    before, settings.looking = settings.looking, True
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        settings.looking = before


def _resolved(target: str) -> tuple[ModuleType, Any]:
    """The module that a target names, and what in it."""
    name, colon, attribute = target.partition(":")
    if not name or (colon and not attribute):
        raise UsageError(f"{target!r}: {_FORMS}.")
    module = _import(name)
    node: Any = module
    for part in attribute.split(".") if colon else ():
        if not hasattr(node, part):
            raise UsageError(f"{target}: is nothing, and no workflow. {_listed(target, module)}")
        node = getattr(node, part)
    return module, node


def _import(name: str) -> ModuleType:
    path = Path(name)
    is_file = path.suffix == ".py" or "/" in name
    place = Path.cwd()
    if is_file:
        if path.suffix != ".py" or not path.is_file():
            raise UsageError(f"{name}: no such file. Name a module as in an import, or a file that ends in .py.")
        place, name = _place(path.resolve())
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageError(f"no module {error.name!r} in {place} or on Python's path.") from error
        raise UsageError(f"importing {name} failed: {error}.") from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"importing {name} failed: {type(error).__name__}: {error}") from error
    if is_file and Path(str(module.__file__)).resolve() != path.resolve():
        raise UsageError(f"{path}: Python finds {module.__file__} under the name {name!r}. Rename one of them.")
    return module


def _place(file: Path) -> tuple[Path, str]:
    """The directory that has to be on Python's path for a file to be imported, and its name there."""
    parts = [] if file.name == "__init__.py" else [file.stem]
    folder = file.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(parts)


def _members(node: Any, target: str, module: ModuleType) -> list[Flow]:
    """The workflows that a node is or holds; at least one."""
    if isinstance(node, Workflow):
        return [node]
    if isinstance(node, ModuleType):
        found = list(_named(node).values())
        found += [flow for flow in workflows.values() if flow.fn.__module__ == node.__name__ and flow not in found]
    else:
        values = node.values() if isinstance(node, Mapping) else node
        found = list(values) if isinstance(node, Mapping | list | tuple | set | frozenset) else []
        strange = next((each for each in found if not isinstance(each, Workflow)), None)
        if strange is not None:
            raise UsageError(f"{target}: holds {strange!r:.80}, which is no workflow.")
    if not found:
        what = "" if isinstance(node, ModuleType) else f"is a {type(node).__name__}, and no workflow. "
        raise UsageError(f"{target}: {what}{_listed(target, module)}")
    return found


def _named(module: ModuleType) -> dict[str, Flow]:
    return {name: value for name, value in vars(module).items() if isinstance(value, Workflow)}


def _listed(target: str, module: ModuleType) -> str:
    """Which workflows a module has, spelled as the target was."""
    name, found = target.partition(":")[0], _named(module)
    if not found:
        return f"{name} holds no workflow."
    return f"{name} holds: {', '.join(f'{name}:{each}' for each in sorted(found))}."
