"""The user's workflows, imported because the user names them: ``app:flow``, ``app:flows`` or ``app``.

A record never says what to import.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from agentflow.errors import AgentflowError, UsageError
from agentflow.flow import Workflow
from agentflow.handles import workflows


def load(names: Iterable[str]) -> dict[str, Workflow[..., Any]]:
    """Workflows by their names.

    Args:
        names: each ``module:attribute`` (a workflow, or a list or dict of them; dots go on inside) or ``module`` (all
            that it defines). Modules are looked for in the working directory first, as ``python -m`` does.

    Raises:
        UsageError: there is no such module or attribute, it fails, or there is no workflow in it.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: dict[str, Workflow[..., Any]] = {}
    for name in names:
        module_name, _, attribute = name.partition(":")
        module = _module(module_name, name)
        target: Any = module
        for part in attribute.split(".") if attribute else ():
            if not hasattr(target, part):
                known = ", ".join(sorted(key for key, value in vars(module).items() if isinstance(value, Workflow)))
                raise UsageError(f"{name!r}: {module_name} has no {attribute!r}. Its workflows: {known or 'none'}.")
            target = getattr(target, part)
        made = list(_workflows(target))
        if not made:
            raise UsageError(f"{name!r} is no workflow, nor a list of them: {type(target).__name__!s}.")
        found |= {each.name: each for each in made}
    return found


def _module(module: str, name: str) -> ModuleType:
    if module.endswith(".py") or "/" in module or not module:
        shown = module.removesuffix(".py").strip("/").replace("/", ".") or "app"
        raise UsageError(f"{name!r}: name the module, as in an import: {shown}:flow.")
    try:
        return importlib.import_module(module)
    except AgentflowError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise UsageError(f"{name!r}: there is no module {module!r} in {os.getcwd()} or on sys.path.") from error
        raise UsageError(f"{name!r}: importing it failed: {error}.") from error
    except Exception as error:
        raise UsageError(f"{name!r}: importing it failed with {type(error).__name__}: {error}.") from error


def _workflows(target: Any) -> Iterable[Workflow[..., Any]]:
    if isinstance(target, Workflow):
        return [target]
    if isinstance(target, ModuleType):
        own = [each for each in workflows.values() if each.fn.__module__ == target.__name__]
        return own + [each for each in vars(target).values() if isinstance(each, Workflow) and each not in own]
    if isinstance(target, Mapping):
        target = list(target.values())
    if isinstance(target, list | tuple | set | frozenset):
        return [each for each in target if isinstance(each, Workflow)]
    return []
