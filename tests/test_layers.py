"""Imports point one way, each dependency has one door, and the face of the package is pinned."""

from __future__ import annotations

import ast
import functools
import json
import os
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
    {"rich"},
    {"batchserver", "cancelled", "digests", "errors", "models", "plain", "words", "workers"},
    {"ops", "pgurl", "redact"},
    {"voice"},
    {"observing", "calls", "canonical", "codec.common", "cron", "durations", "files", "ledger", "line", "marks", "network", "providers.streams", "schema", "store", "tokens", "typecheck"},
    {"bytecode", "clocks", "commits", "limits", "codec.classes", "codec.tree", "compare", "layout", "prompts", "providers.common", "records", "spill"},
    {"answers", "codec.values", "codedigest", "taskdocs", "create", "outputtypes", "providers.anthropic", "postgres", "providers.openai", "reads", "writer"},
    {"pgsql"},
    {"pgreads", "pgwriter"},
    {"folder", "pgjournal"},
    {"capture", "codec.arrays", "codec.exceptions", "journal", "providers.batching", "providers.openai_chat"},
    {"codec.objects", "index", "lease", "providers.registry"},
    {"background", "children", "codec", "costs", "places", "providers", "reuse", "rundocs", "waits"},
    {"costlines", "tools"},
    {"budgets", "generate"},
    {"scripted", "settings", "shown", "supplied"},
    {"cardparts", "kernels", "sending"},
    {"otel", "plans"},
    {"observers"},
    {"clock", "run"},
    {"engine", "watched"},
    {"drive"},
    {"portal"},
    {"batches", "blocking", "fanout", "human", "scratch", "values"},
    {"control", "events", "leftover"},
    {"context", "humantask", "purge", "redo", "rundiff", "shapes", "steps", "tasks"},
    {"agent", "moments", "otherform"},
    {"aicall", "export", "replies", "rowcheck", "terminal"},
    {"upkeep"},
    {"embeddings", "handles"},
    {"childcalls", "runcards"},
    {"cards", "forms"},
    {"notebook"},
    {"opening"},
    {"closing"},
    {"flow", "runs"},
    {"loading", "people", "schedules", "sync", "sync.fanout", "sync.flow", "testing"},
    {"sync.calls", "worker"},
    {"crashes", "histories", "recordings"},
    {"pytest_plugin"},
    {""},
    {"demo", "ui"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
FOLDERS = ("cli", "demo", "otel", "ui")  # their files import one another freely

# Who may import what is costly or may be exchanged.
DOORS = {
    "diskcache": {"create"},
    "psycopg": {"postgres"},
    "openai": {"providers.openai"},
    "anthropic": {"providers.anthropic"},
    "cronsim": {"cron"},
    "genai_prices": {"ledger"},
    "tiktoken": {"tokens"},
    "tiktoken_ext": {"tokens"},
    "typer": {"cli"},
    "rich": {"cli"},
    "opentelemetry": {"otel"},
    "ipywidgets": {"forms"},
    "starlette": {"ui"},
    "uvicorn": {"ui"},
}


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_of(file): file for file in sorted(ROOT.rglob("*.py"))}


def layer_name(module: str) -> str:
    return next((folder for folder in FOLDERS if module.split(".")[0] == folder), module)


@functools.cache
def imports(file: Path) -> tuple[str, ...]:
    """Full names of what a file imports anywhere, but not what only a type checker sees."""
    return tuple(_imports(file))


def _imports(file: Path) -> Iterator[str]:
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


HEAVY = ["cronsim", "openai", "anthropic", "pydantic", "typer", "rich", "tiktoken", "numpy", "pandas", "genai_prices", "httpx2", "starlette", "uvicorn"]


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


# What a program of plain code never waits for: an event loop and what comes with it, and what only other programs use.
NOT_FOR_PLAIN_CODE = [
    "asyncio", "concurrent.futures", "difflib", "hashlib", "logging", "random", "socket", "ssl", "subprocess",
    "agentflow.agent", "agentflow.aicall", "agentflow.batches", "agentflow.budgets", "agentflow.cancelled",
    "agentflow.clocks", "agentflow.compare", "agentflow.control", "agentflow.cron", "agentflow.drive",
    "agentflow.embeddings", "agentflow.events", "agentflow.fanout", "agentflow.generate", "agentflow.human",
    "agentflow.models", "agentflow.portal", "agentflow.prompts", "agentflow.providers", "agentflow.records",
    "agentflow.redo", "agentflow.runs", "agentflow.sending", "agentflow.sync.calls", "agentflow.sync.fanout",
    "agentflow.tasks", "agentflow.tools",
]  # fmt: skip
# An async program has the loop, and none of the rest.
NOT_FOR_AN_ASYNC_STEP = [
    name
    for name in NOT_FOR_PLAIN_CODE
    if name.startswith("agentflow.") and name.partition(".")[2] not in ("cancelled", "clocks", "drive", "portal")
]


def loaded(program: str, journal: Path, names: list[str]) -> tuple[list[str], str]:
    """Which of the modules a program loads that were not there when it began, and what it says on stderr."""
    code = f"import sys\nbefore = set(sys.modules)\n{program}\nimport json\n"
    code += f"print(json.dumps([name for name in {names!r} if name in sys.modules and name not in before]))"
    env = os.environ | {"AGENTFLOW_PATH": str(journal)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


PLAIN_WORKFLOW = """
from agentflow.sync import step, workflow
@workflow
def flow(ctx, n: int):
    return step("add", lambda: n + 1)
assert flow.run({n}) == {n} + 1
"""
PLAIN_STEP = """
from agentflow.sync import step
assert step("add", lambda n: n + 1, {n}) == {n} + 1
"""
ASYNC_WORKFLOW = """
from agentflow import step, workflow
async def add(n):
    return n + 1
@workflow
async def flow(ctx, n: int):
    return await step("add", add, n)
assert flow.run_sync({n}) == {n} + 1
"""


@pytest.mark.parametrize("program", [PLAIN_WORKFLOW, PLAIN_STEP], ids=["workflow", "scratch"])
def test_a_plain_step_needs_no_event_loop_no_logging_and_nothing_of_models(program: str, tmp_path: Path) -> None:
    loaded(program.format(n=1), tmp_path / "journal", [])  # diskcache, which creates the journal, loads what it likes
    for n in (1, 2):  # a replay, and a step that runs
        assert loaded(program.format(n=n), tmp_path / "journal", NOT_FOR_PLAIN_CODE + HEAVY)[0] == []


def test_an_async_step_needs_nothing_of_models_and_people(tmp_path: Path) -> None:
    loaded(ASYNC_WORKFLOW.format(n=1), tmp_path / "journal", [])
    for n in (1, 2):
        assert loaded(ASYNC_WORKFLOW.format(n=n), tmp_path / "journal", NOT_FOR_AN_ASYNC_STEP + HEAVY)[0] == []


def test_the_main_names_load_nothing_that_few_programs_need(tmp_path: Path) -> None:
    program = "from agentflow import generate_content, human_task, runs, step, workflow\nruns.list()"
    rare = ["email", "tempfile", "agentflow.compare", "agentflow.leftover", "agentflow.purge", "agentflow.redo"]
    loaded(program, tmp_path / "journal", [])
    assert loaded(program, tmp_path / "journal", rare + HEAVY)[0] == []


@pytest.mark.parametrize(
    "before, after, said",
    [
        ("", "", True),
        ("import logging", "", True),
        ("", "import logging", True),
        ("import logging; logging.basicConfig(handlers=[logging.NullHandler()])", "", False),
        ("", "import logging; logging.basicConfig(handlers=[logging.NullHandler()])", False),
        ("", "import agentflow; agentflow.configure(quiet=True)", False),
        ("", "import logging; logging.getLogger('agentflow').setLevel('ERROR')", False),
        ("import logging", "logging.getLogger('agentflow').setLevel('ERROR')", False),
        ("import logging; logging.getLogger('agentflow').addHandler(logging.NullHandler())", "", False),
    ],
)
def test_the_end_of_a_run_is_printed_once_unless_the_program_does_its_own_logging(
    before: str, after: str, said: bool, tmp_path: Path
) -> None:
    program = f"{before}\nimport agentflow.sync\n{after}\n{PLAIN_WORKFLOW.format(n=1)}"
    _, err = loaded(program, tmp_path / "journal", [])
    assert err.count("completed") == said, err


def test_what_is_said_goes_to_handlers_of_a_program_that_begins_to_log_later(tmp_path: Path) -> None:
    program = (
        "import agentflow.sync, logging\n"
        "class Keep(logging.Handler):\n"
        "    def emit(self, record): print(record.levelname, record.module, record.getMessage(), file=sys.stderr)\n"
        "logging.getLogger('agentflow').addHandler(Keep())\n"
    )
    _, err = loaded(program + PLAIN_WORKFLOW.format(n=1), tmp_path / "journal", [])
    assert "INFO closing flow-" in err
