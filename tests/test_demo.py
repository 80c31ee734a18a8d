"""The demo: killed half-way, resumed, decided, completed; nobody is charged twice and nothing is paid twice."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from agentflow import runs, step, tasks, workflow
from tests.programs import ROOT, environment


def agentflow(folder: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agentflow", *args],
        cwd=folder, env=environment(folder, env), capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def _cpu() -> float:
    """Seconds of processor time of all child processes: what a busy machine does not change."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@dataclass
class Demo:
    folder: Path
    out: str
    err: str
    seconds: float


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    start = _cpu()
    done = agentflow(folder, "demo")
    assert done.returncode == 0, done.stdout + done.stderr
    return Demo(folder, done.stdout, done.stderr, _cpu() - start)


@pytest.fixture
def left(demo, monkeypatch) -> Demo:
    """The demo, with this process looking into its journal."""
    monkeypatch.setenv("AGENTFLOW_PATH", str(demo.folder / "journal"))
    return demo


def test_the_demo_tells_of_the_kill_the_replay_the_approval_and_the_sums(demo):
    assert "Killed with SIGKILL while shipping demo-105" in demo.out
    assert "demo-105 · ship: in doubt" in demo.out
    assert re.search(r"demo-105 +completed +3 replayed, 1 run +saved \$0\.0004", demo.out)
    assert re.search(r"\$ agentflow tasks approve t-\w+ --by 'the manager'", demo.out)
    assert re.search(r"demo-107 +failed \(Rejected\), 1 undone", demo.out)
    last = demo.out.strip().splitlines()[-1]
    assert re.fullmatch(r"\d+ steps run once · \d+ replayed · paid \$\d\.\d{4}, saved \$\d\.\d{4}", last)


def test_the_demo_is_quick_fits_80_columns_and_has_no_colour_when_piped(demo):
    assert demo.seconds < 8  # and it sleeps for 0.1 s, so it is over in less than ten
    words = [line for line in demo.out.splitlines() if not line.startswith("Journal: ")]
    assert max(map(len, words)) <= 80
    assert "\x1b" not in demo.out + demo.err
    assert "Traceback" not in demo.out + demo.err


def test_every_order_was_charged_once_and_every_reply_paid_once_in_spite_of_the_kill(left):
    found = runs.list(workflow="process-order")
    assert len(found) == 8
    assert "8 charges in 3 processes, one killed" in left.out
    for run in found:
        names = [record.name for record in run.steps]
        assert names.count("assess-order") == 1
        assert run.cost > 0
    killed = runs.get("demo-105")
    assert next(record for record in killed.steps if record.name == "ship").in_doubt == 1
    paid = sum(run.cost for run in found)
    assert f"paid ${paid:.4f}" in left.out


def test_all_orders_but_the_rejected_one_are_shipped_and_that_one_is_refunded(left):
    status = {run.id: run.status for run in runs.list()}
    assert status.pop("demo-107") == "failed"
    assert set(status.values()) == {"completed"}
    assert "7 shipped, 1 refunded" in left.out
    rejected = runs.get("demo-107")
    assert rejected.error == "Rejected: demo-107: looks like fraud"
    assert "undo charge" in [record.name for record in rejected.steps]
    decided = {task.run_id: (task.status, task.decision.by) for task in tasks.list(status=None)}
    assert decided == {"demo-103": ("approved", "the manager"), "demo-107": ("rejected", "the manager")}


def test_a_refused_charge_was_retried(left):
    charge = next(record for record in runs.get("demo-102").steps if record.name == "charge")
    assert charge.attempts == 2


def test_the_commands_it_names_work_on_what_it_left(demo):
    for words in re.findall(r"^ +\$ agentflow (runs .*|tasks list.*)$", demo.out, re.MULTILINE):
        done = agentflow(demo.folder, *words.split())
        assert done.returncode == 0 and "demo-10" in done.stdout, done.stderr
    listed = json.loads(agentflow(demo.folder, "runs", "list", "--json").stdout)
    assert len(listed) == 8 and listed[0]["workflow"] == "process-order"
    task = json.loads(agentflow(demo.folder, "tasks", "list", "--all", "--json").stdout)[0]
    again = agentflow(demo.folder, "tasks", "approve", task["id"])
    assert again.returncode == 1 and "was approved already, by the manager" in again.stderr


@pytest.mark.torture
def test_a_second_demo_takes_new_orders_and_leaves_other_records_alone(tmp_path):
    calls = []

    @workflow("process-order", run_id=lambda number: f"order-{number}")
    async def mine(ctx, number: int) -> str:
        return await step("charge", lambda: calls.append(number) or "mine", idempotency_key=f"charge-{number}")

    assert mine.run_sync(101) == "mine"
    for batch in (1, 2):
        done = agentflow(tmp_path, "demo", "--json")
        outcome = json.loads(done.stdout)
        assert outcome["runs"] == [f"demo-{batch}0{n}" for n in range(1, 9)]
        assert (outcome["charges"], outcome["model_calls"], outcome["shipped"], outcome["refunded"]) == (8, 8, 7, 1)
        assert outcome["paid"] > 0 and outcome["saved"] > outcome["paid"]
    assert mine.run_sync(101) == "mine" and calls == [101]
    assert len(runs.list()) == 17


def test_it_works_in_any_directory_and_leaves_nothing_but_the_journal(tmp_path):
    plain = {key: value for key, value in os.environ.items() if key not in ("AGENTFLOW_PATH", "AGENTFLOW_MODEL")}
    plain |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "agentflow", "demo"],
        cwd=tmp_path / "empty", env=plain, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.listdir(tmp_path / "empty") == [".agentflow"]
    assert os.listdir(tmp_path / "tmp") == []
    assert "$ agentflow runs list" in done.stdout


def test_live_without_a_model_is_a_usage_error_before_anything_starts(tmp_path):
    done = agentflow(tmp_path, "demo", "--live")
    assert done.returncode == 2
    assert "No model is set" in done.stderr and "AGENTFLOW_MODEL" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "journal").exists()
