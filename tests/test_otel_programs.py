"""Tracing as whole programs meet it: providers that are the process's own, no package at all, kills, the launcher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.programs import environment, notes, run_program, write_program

COLLECT = """
import json
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

class ToFile(SpanExporter):
    def export(self, spans):
        with open(HERE / "spans.jsonl", "a") as file:
            for span in spans:
                links = [link.context for link in span.links]
                file.write(json.dumps({
                    "name": span.name, "pid": os.getpid(), "attributes": dict(span.attributes),
                    "scope": span.instrumentation_scope.name,
                    "span": span.context.span_id, "trace": span.context.trace_id,
                    "parent": span.parent.span_id if span.parent else None,
                    "links": [[context.trace_id, context.span_id] for context in links],
                }) + "\\n")
        return SpanExportResult.SUCCESS

def collect(exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
"""
FLOW = """
@workflow("add")
async def add(ctx, n: int):
    return await step("plus", lambda: n + 1)
"""


def spans(folder: Path) -> list[dict[str, Any]]:
    file = folder / "spans.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def names(folder: Path) -> list[str]:
    return [span["name"] for span in spans(folder)]


# -- when there is a trace -------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after", "between"])
def test_a_provider_may_be_set_before_or_after_the_import_and_after_a_run(when: str, tmp_path: Path) -> None:
    provide = f"{COLLECT}\ncollect(ToFile())\n"
    if when == "between":
        run_program(f"{FLOW}\nassert add.run_sync(1) == 2\n{provide}\nassert add.run_sync(5) == 6", tmp_path)
    elif when == "after":
        run_program(f"{FLOW}\n{provide}\nassert add.run_sync(1) == 2", tmp_path)
    else:
        program = tmp_path / "program.py"
        program.write_text(f"import os\nfrom pathlib import Path\nHERE = Path({str(tmp_path)!r})\n{provide}\nfrom agentflow import *\n{FLOW}\nassert add.run_sync(1) == 2")
        run_program(program, tmp_path)
    assert names(tmp_path) == ["step plus", "invoke_workflow add"]
    assert {span["scope"] for span in spans(tmp_path)} == {"agentflow"}


def test_configure_may_turn_it_off(tmp_path: Path) -> None:
    run_program(f"{COLLECT}\ncollect(ToFile())\nconfigure(tracing=False)\n{FLOW}\nadd.run_sync(1)", tmp_path)
    assert names(tmp_path) == []


def test_configure_may_ask_for_the_provider_that_the_environment_names(tmp_path: Path) -> None:
    ended = run_program(
        f"configure(tracing=True)\n{FLOW}\nadd.run_sync(1)\n"
        "from opentelemetry import trace\nprint(type(trace.get_tracer_provider()).__module__)",
        tmp_path,
        env={"OTEL_PYTHON_TRACER_PROVIDER": "sdk_tracer_provider"},
    )
    assert ended.out.startswith("opentelemetry.sdk")


def test_the_launcher_of_opentelemetry_is_enough(tmp_path: Path) -> None:
    program = write_program(f"{FLOW}\nprint(add.run_sync(1))", tmp_path)
    # What the command opentelemetry-instrument is, which may be installed anywhere.
    launcher = [sys.executable, "-c", "from opentelemetry.instrumentation.auto_instrumentation import run; run()"]
    exporters = ["--traces_exporter", "console", "--metrics_exporter", "none", "--logs_exporter", "none"]
    done = subprocess.run(
        [*launcher, *exporters, sys.executable, str(program)],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"name": "invoke_workflow add"' in done.stdout and '"name": "step plus"' in done.stdout


# -- when there is none ----------------------------------------------------------------------

NO_MODEL = """
import agentflow.sync as plain
@plain.workflow("plainly")
def plainly(ctx, n: int):
    return plain.step("plus", lambda: n + 1)

async def asks(n):
    return await generate_content(f"Hello {n}", model="openai:gpt-4o-mini")

@workflow("talk")
async def talk(ctx, n: int):
    return await step("ask", asks, n)

from agentflow.testing import FakeModel
def all_of_it(n):
    assert add.run_sync(n) == plainly.run(n) == n + 1
    with FakeModel(["Hi"]):
        assert talk.run_sync(n) == "Hi"
"""


def test_without_the_package_everything_works_and_tracing_names_what_is_missing(tmp_path: Path) -> None:
    block = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""
    refused = "try:\n    configure(tracing=True)\nexcept UsageError as error:\n    print(error)\n"
    ended = run_program(f"{block}{FLOW}{NO_MODEL}\nall_of_it(1)\nall_of_it_again = add.run_sync(1)\n{refused}", tmp_path)
    assert "opentelemetry-api" in ended.out and "[otel]" in ended.out


def test_a_program_that_loads_no_opentelemetry_loads_none_through_agentflow(tmp_path: Path) -> None:
    told = 'print([name for name in sys.modules if name.startswith(("opentelemetry", "agentflow.otel"))])'
    assert run_program(f"{FLOW}{NO_MODEL}\nall_of_it(1)\n{told}", tmp_path).out == "[]\n"


def test_a_program_that_only_has_the_api_is_not_observed(tmp_path: Path) -> None:
    told = "from agentflow import observers\nprint(observers.begin())"
    assert run_program(f"import opentelemetry.trace, opentelemetry.metrics\n{FLOW}\nadd.run_sync(1)\n{told}", tmp_path).out == "()\n"
    document = 'from agentflow import rundocs, scratch\nprint("trace" in rundocs.read(scratch.open_journal(), runs.list()[0].id))'
    assert run_program(document, tmp_path).out == "False\n"


# -- what lasts ------------------------------------------------------------------------------


def test_after_a_kill_the_next_execution_links_to_the_one_that_died_and_tells_the_doubt(tmp_path: Path) -> None:
    source = f"""
{COLLECT}
collect(ToFile())

def work():
    span = trace.get_current_span()
    if not (HERE / "notes.txt").exists():
        note(f"{{span.parent.trace_id}} {{span.parent.span_id}}")
        die()
    return "done"

@workflow("long")
async def long(ctx, n: int):
    await step("first", lambda: 1)
    return await step("work", work)

print(long.run_sync(1))
"""
    run_program(source, tmp_path, expect_kill=True)
    assert names(tmp_path) == ["step first"]  # what was open when it died is lost
    run_program(source, tmp_path)
    (died,) = [[int(part) for part in line.split()] for line in notes(tmp_path)]
    run = spans(tmp_path)[-1]
    assert run["name"] == "invoke_workflow long" and run["links"] == [died] and run["trace"] != died[0]
    assert run["attributes"]["agentflow.resumed"] is True and run["attributes"]["agentflow.execution"] == 2
    assert run["attributes"]["agentflow.in_doubt"] == 1 and run["attributes"]["agentflow.steps.replayed"] == 1
    (work,) = [span for span in spans(tmp_path) if span["name"] == "step work"]
    assert work["attributes"]["agentflow.in_doubt"] == 1 and work["parent"] == run["span"]


def test_an_exporter_that_raises_loses_no_step_and_no_reply(tmp_path: Path) -> None:
    broken = """
class Broken(SpanExporter):
    def export(self, spans):
        raise RuntimeError("no collector")
"""
    run_program(f"{FLOW}{NO_MODEL}{COLLECT}{broken}\ncollect(Broken())\nall_of_it(1)", tmp_path)
    ended = run_program(
        f"{FLOW}{NO_MODEL}\nfor flow in (add, talk):\n    flow.run_sync(1)\nplainly.run(1)", tmp_path, name="again.py"
    )
    assert ended.err.count("1 step: 1 replayed, 0 run") == 3


def test_a_forked_process_traces_its_own_runs(tmp_path: Path) -> None:
    run_program(
        f"""
{COLLECT}{FLOW}
collect(ToFile())
import agentflow.sync as plain

@plain.workflow("outer")
def outer(ctx, n: int):
    return plain.step("forks", forks)

def forks():
    pid = os.fork()
    if pid == 0:
        os.environ["AGENTFLOW_PATH"] = str(HERE / "other")
        configure(path=HERE / "other", quiet=True)
        from agentflow.calls import here
        here.set(None)
        add.run_sync(7)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    return pid

print(outer.run(1))
""",
        tmp_path,
    )
    by_name = {span["name"]: span for span in spans(tmp_path)}
    assert len(by_name) == len(spans(tmp_path)) == 4
    assert by_name["invoke_workflow add"]["pid"] != by_name["invoke_workflow outer"]["pid"]
    # What a child does in a step is inside the step, in the trace too.
    assert by_name["invoke_workflow add"]["parent"] == by_name["step forks"]["span"]
    assert by_name["step plus"]["parent"] == by_name["invoke_workflow add"]["span"]


# -- the SDKs --------------------------------------------------------------------------------


def test_an_sdk_that_makes_spans_itself_makes_none_beside_ours(tmp_path: Path) -> None:
    source = f"""
{COLLECT}
collect(ToFile())
from agentflow.testing import FakeModel

@workflow("asks")
async def asks(ctx, text: str):
    return await generate_content(text, model="anthropic:claude-haiku-4-5")

with FakeModel({{"traced": "one", "alone": "two"}}):
    asks.run_sync("traced")
    configure(tracing=False)
    asks.run_sync("alone")
"""
    run_program(source, tmp_path)
    asked = [span for span in spans(tmp_path) if span["attributes"].get("gen_ai.operation.name") == "chat"]
    assert [span["scope"] for span in asked] == ["agentflow", "com.anthropic.sdk.python"]
