"""Imports point one way, each dependency has one door, and the face of the package is pinned."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import agentflow
from agentflow import errors

ROOT = Path(__file__).resolve().parent.parent / "agentflow"

# Lowest first. A module imports from lower layers only, also inside functions. A new module gets a layer here.
LAYERS = [
    {"batchserver", "cancelled", "errors", "models", "plain", "words", "workers"},
    {"redact"},
    {"voice"},
    {"calls", "canonical", "codec.common", "cron", "durations", "files", "ledger", "line", "marks", "network", "providers.streams", "schema", "store", "tokens", "typecheck"},
    {"bytecode", "clocks", "limits", "codec.classes", "codec.tree", "compare", "layout", "prompts", "providers.common", "records", "spill"},
    {"codec.values", "codedigest", "taskdocs", "create", "outputtypes", "providers.anthropic", "providers.openai", "reads", "writer"},
    {"capture", "codec.arrays", "codec.exceptions", "journal", "providers.batching", "providers.openai_chat"},
    {"codec.objects", "index", "lease", "providers.registry"},
    {"background", "children", "codec", "costs", "places", "providers", "reuse", "rundocs", "waits"},
    {"costlines", "tools"},
    {"budgets", "generate"},
    {"scripted", "settings", "shown", "supplied"},
    {"sending"},
    {"plans"},
    {"clock", "run"},
    {"engine"},
    {"drive"},
    {"portal"},
    {"batches", "blocking", "fanout", "human", "scratch", "values"},
    {"control", "events", "leftover"},
    {"context", "humantask", "purge", "redo", "rundiff", "steps", "tasks"},
    {"agent", "moments", "otherform"},
    {"aicall", "export", "replies", "terminal", "upkeep"},
    {"embeddings", "handles"},
    {"childcalls"},
    {"opening"},
    {"closing"},
    {"flow", "runs"},
    {"loading", "people", "schedules", "sync", "sync.fanout", "sync.flow", "testing"},
    {"sync.calls", "worker"},
    {"crashes", "histories", "recordings"},
    {"pytest_plugin"},
    {""},
    {"demo"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
FOLDERS = ("cli", "demo")  # their files import one another freely

# Who may import what is costly or may be exchanged.
DOORS = {
    "diskcache": {"create"},
    "openai": {"providers.openai"},
    "anthropic": {"providers.anthropic"},
    "cronsim": {"cron"},
    "genai_prices": {"ledger"},
    "tiktoken": {"tokens"},
    "tiktoken_ext": {"tokens"},
    "typer": {"cli"},
    "rich": {"cli"},
}


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_of(file): file for file in sorted(ROOT.rglob("*.py"))}


def layer_name(module: str) -> str:
    return next((folder for folder in FOLDERS if module.split(".")[0] == folder), module)


def imports(file: Path) -> Iterator[str]:
    """Full names of what a file imports anywhere, but not what only a type checker sees."""
    todo: list[ast.AST] = [ast.parse(file.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner.removeprefix("agentflow.") in MODULES else str(node.module)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_from_lower_layers_only(module: str) -> None:
    name = layer_name(module)
    assert name in LEVEL, f"{module} has no layer yet: give it one in tests/test_layers.py"
    for imported in imports(MODULES[module]):
        if imported.split(".")[0] != "agentflow":
            continue
        other = layer_name(imported.removeprefix("agentflow").lstrip("."))
        if other == name and name in FOLDERS:
            continue
        assert LEVEL[other] < LEVEL[name], f"{module} (layer {LEVEL[name]}) imports {imported} (layer {LEVEL[other]})"


def test_every_layer_is_of_modules_that_exist() -> None:
    assert set(LEVEL) == {layer_name(module) for module in MODULES}


@pytest.mark.parametrize("package, doors", DOORS.items())
def test_dependency_is_imported_through_its_own_file_only(package: str, doors: set[str]) -> None:
    users = {layer_name(m) for m, file in MODULES.items() if package in {name.split(".")[0] for name in imports(file)}}
    assert users <= doors, f"{package} is imported in {sorted(users - doors)}"


def test_names_of_the_package_are_pinned() -> None:
    assert sorted(set(agentflow.__all__) - set(errors.__all__)) == [
        "Context",
        "Decision",
        "Escalate",
        "HumanTask",
        "Plan",
        "Prompt",
        "Reply",
        "Retry",
        "Run",
        "StepRecord",
        "Workflow",
        "configure",
        "current_step",
        "embed",
        "errors",
        "generateContent",
        "generate_content",
        "humanTask",
        "human_task",
        "load_prompt",
        "parallel",
        "register_type",
        "runs",
        "send_event",
        "step",
        "tasks",
        "tool",
        "workflow",
    ]
    assert set(errors.__all__) <= set(agentflow.__all__)
    assert len(agentflow.__all__) == len(set(agentflow.__all__))
    for name in agentflow.__all__:
        assert getattr(agentflow, name) is not None
    assert agentflow.generateContent is agentflow.generate_content and agentflow.humanTask is agentflow.human_task
    assert set(dir(agentflow)) >= set(agentflow.__all__)


def test_errors_that_are_drawn_as_a_tree_are_those_that_exist() -> None:
    drawn = {word for word in (errors.__doc__ or "").replace(",", " ").split() if word in vars(errors)}
    assert drawn - {"Decision"} >= set(errors.__all__)
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.AgentflowError), name
        assert getattr(errors, name).__doc__, name


HEAVY = ["cronsim", "openai", "anthropic", "pydantic", "typer", "rich", "tiktoken", "numpy", "pandas", "genai_prices", "httpx2"]


@pytest.mark.parametrize(
    "program",
    [
        "import agentflow",
        "from agentflow import *",
        "from agentflow import generate_content, human_task, parallel, step, workflow",
        "from agentflow.sync import *",
    ],
)
def test_importing_the_package_imports_nothing_heavy(program: str) -> None:
    code = f"{program}\nimport json, sys\nprint(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_running_a_plain_workflow_imports_no_sdk(tmp_path: Path) -> None:
    code = (
        "import json, sys, asyncio, agentflow\n"
        f"agentflow.configure(path={str(tmp_path / 'journal')!r}, quiet=True)\n"
        "@agentflow.workflow('plain')\n"
        "async def flow(ctx, n: int):\n"
        "    return await agentflow.step('s', lambda: n + 1)\n"
        "assert flow.run_sync(1) == 2\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
