"""The pytest plugin from outside: journals of their own, no call by accident, fixtures, and what it costs others."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agentflow import pytest_plugin
from tests.loopback import Loopback
from tests.outside import Project
from tests.programs import ROOT

APP = """
    from agentflow import generate_content, human_task, step, workflow

    @workflow
    async def greet(ctx, name: str) -> str:
        await step("note", lambda: "noted")
        return await generate_content(f"Greet {name}.", model="openai:gpt-5-mini")
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = Project(tmp_path)
    made.write("app.py", APP)
    return made


def test_every_test_has_a_journal_of_its_own_in_memory_and_nothing_is_left(project: Project) -> None:
    project.write(
        "test_app.py",
        """
        import os
        from pathlib import Path

        import pytest
        from agentflow import runs
        from app import greet

        @pytest.mark.parametrize("number", range(4))
        def test_greets(number, fake_model):
            assert runs.list() == []
            fake_model(["Hello, Ada!"])
            assert greet.run_sync("Ada") == "Hello, Ada!"
            assert greet.run_sync("Ada") == "Hello, Ada!"
            assert len(runs.list()) == 1
            with open("folders.txt", "a") as file:
                file.write(os.environ["AGENTFLOW_PATH"] + "\\n")

        def test_another_one_where_it_asks(tmp_path, monkeypatch, fake_model):
            monkeypatch.setenv("AGENTFLOW_PATH", str(tmp_path / "mine"))
            fake_model(["Hello!"])
            greet.run_sync("Bob")
            assert (tmp_path / "mine" / "cache.db").exists()
        """,
    )
    for parallel in ((), ("-n", "2")):
        done = project.pytest(*parallel)
        assert (done.code, done.passed) == (0, 5), done
        folders = [Path(line) for line in (project.folder / "folders.txt").read_text().splitlines()]
        (project.folder / "folders.txt").unlink()
        assert len(set(folders)) == 4 and not any(folder.parent.exists() for folder in folders)
        if (memory := pytest_plugin._memory()) is not None:
            assert all(folder.is_relative_to(memory) for folder in folders)
    assert not (project.folder / ".agentflow").exists()


def test_a_path_that_an_imported_module_configures_is_not_the_tests(project: Project) -> None:
    project.write("conf.py", "import agentflow\nagentflow.configure(path='precious')\n")
    project.write(
        "test_app.py",
        """
        import conf
        from app import greet

        def test_greets(fake_model):
            fake_model(["Hello, Ada!"])
            assert greet.run_sync("Ada") == "Hello, Ada!"
        """,
    )
    done = project.pytest()
    assert (done.code, done.passed) == (0, 1), done
    assert not (project.folder / "precious").exists()


LEAKS = """
    import subprocess, sys
    import pytest
    from app import greet

    def test_leaks():
        greet.run_sync("Ada")

    def test_leaks_and_swallows_the_error():
        try:
            greet.run_sync("Ada")
        except Exception:
            pass

    def test_leaks_in_a_program_of_its_own():
        code = "from app import greet; greet.run_sync('Ada')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode and "AGENTFLOW_MODEL_HOSTS" in done.stderr
"""


def test_no_model_call_reaches_the_network_unless_the_test_says_so(project: Project) -> None:
    project.write("test_leaks.py", LEAKS)
    project.write(
        "test_live.py",
        """
        import pytest
        from app import greet

        @pytest.mark.agentflow_live
        def test_live():
            assert "answer to" in greet.run_sync("Ada")

        @pytest.mark.agentflow_live("127.0.0.1")
        def test_live_on_one_host():
            assert "answer to" in greet.run_sync("Ada")

        @pytest.mark.agentflow_live("example.org")
        def test_another_host_is_not_this_one():
            with pytest.raises(ValueError, match="about to reach 127.0.0.1"):
                greet.run_sync("Ada")
        """,
    )
    with Loopback() as server:
        leaks = project.pytest("test_leaks.py", env=server.environment)
        assert (leaks.failed, leaks.passed) == (2, 1), leaks
        for words in ("about to reach 127.0.0.1", "Nothing was sent", "fake_model", "pytest.mark.recorded", "agentflow_live"):
            assert leaks.text.count(words) >= 2, leaks
        assert server.arrived == []
        live = project.pytest("test_live.py", env=server.environment)
        assert (live.failed, live.passed) == (1, 2), live  # the last test asked what was refused
        assert "test_another_host_is_not_this_one" in live.text.split("short test summary")[1]
        assert len(server.arrived) == 2
        project.write("pytest.ini", "[pytest]\nagentflow_hosts = localhost 127.0.0.1\n")
        assert project.pytest("test_leaks.py", env=server.environment).text.count("about to reach") == 0
        assert len(server.arrived) == 5


@pytest.mark.torture
def test_a_test_of_pytest_recording_is_left_to_it_where_that_is_installed(project: Project) -> None:
    project.write(
        "test_app.py",
        """
        import pytest
        from app import greet

        @pytest.mark.vcr
        def test_greets():
            assert "answer to" in greet.run_sync("Ada")
        """,
    )
    project.write("pytest.ini", "[pytest]\nmarkers = vcr: replies come from a cassette\n")
    with Loopback() as server:
        assert "about to reach 127.0.0.1" in project.pytest(env=server.environment).text
        # What counts is that the plugin is there; it lets nothing through that it was not told to record.
        project.write("conftest.py", "def pytest_configure(config): config.pluginmanager.register(object(), 'recording')")
        done = project.pytest(env=server.environment)
        assert (done.code, done.passed) == (0, 1), done
        assert len(server.arrived) == 1


def test_replies_that_do_not_meet_the_calls_fail_the_test_and_show_the_request(project: Project) -> None:
    project.write(
        "test_app.py",
        """
        from app import greet

        def test_too_many_replies(fake_model):
            fake_model(["Hello, Ada!", "Hello again!"])
            greet.run_sync("Ada")

        def test_too_few(fake_model):
            fake_model([])
            try:
                greet.run_sync("Ada")
            except Exception:
                pass
        """,
    )
    done = project.pytest()
    assert done.code == 1 and done.errors == 2, done
    assert "not used: 'Hello again!'" in done.text and "unexpected call 1, only 0 replies" in done.text
    assert '"content": "Greet Ada."' in done.text


def test_a_step_that_changes_an_argument_fails_in_tests_and_may_note_in_a_captured_list(project: Project) -> None:
    project.write(
        "test_app.py",
        """
        import pytest
        from agentflow import step, workflow

        @workflow
        async def flow(ctx, n: int):
            order = {"n": n}
            def pay(order):
                order["paid"] = True
                return n
            return await step("pay", pay, order)

        def test_argument():
            flow.run_sync(1)

        def test_captured():
            seen = []
            @workflow
            async def noting(ctx):
                return await step("note", lambda: seen.append(1))
            noting.run_sync()
            assert seen == [1]
        """,
    )
    done = project.pytest()
    assert (done.failed, done.passed) == (1, 1), done
    assert "step 'pay' changes args[0]" in done.text and "AGENTFLOW_STRICT" in done.text, done
    project.write("pytest.ini", "[pytest]\nagentflow_strict = false\n")
    assert project.pytest().passed == 2


def test_people_and_time_are_scripted_and_thirty_days_take_no_time(project: Project) -> None:
    project.write(
        "test_app.py",
        """
        import pytest
        from agentflow import Waiting, human_task, step, workflow
        from agentflow.testing import Reject

        @workflow
        async def expenses(ctx, amount: int):
            begin = ctx.now("begin")
            await ctx.sleep("30d")
            await ctx.sleep("20s")
            decision = await human_task("approve", assign_to="manager", data=amount)
            if not decision:
                return decision.comment
            count = await human_task("count", data=amount, schema=int, timeout="2d", on_timeout=-1)
            return (ctx.now("end") - begin).days, count, decision.by

        def test_approved(fake_people, fake_clock):
            people = fake_people({"manager": True, "count": lambda task: task.data * 2}, by="grace")
            assert people.run(expenses, 3) == (30, 6, "grace")
            assert [task.type for task in people.decided] == ["approve", "count"]

        def test_rejected(fake_people, fake_clock):
            assert fake_people({"": Reject("too dear")}).run(expenses, 3) == "too dear"

        def test_nobody_counts(fake_people, fake_clock):
            assert fake_people({"manager": True}).run(expenses, 3) == (32, -1, "test")

        def test_nobody_at_all(fake_people, fake_clock):
            with pytest.raises(Waiting, match="for manager"):
                fake_people({}).run(expenses, 3)

        def test_by_hand(fake_clock):
            with pytest.raises(Waiting):
                expenses.run_sync(3)
            fake_clock.advance("29d")
            with pytest.raises(Waiting, match="sleep until"):
                expenses.run_sync(3)
            fake_clock.advance("1d")
            with pytest.raises(Waiting, match="for manager"):
                expenses.run_sync(3)
        """,
    )
    done = project.pytest("--durations=0")
    assert (done.code, done.passed) == (0, 5), done


def test_sleeps_of_plain_code_take_no_time_either(project: Project) -> None:
    project.write(
        "test_app.py",
        """
        from agentflow.sync import step, workflow

        @workflow
        def flow(ctx, n: int):
            begin = ctx.now("begin")
            ctx.sleep("50s")
            ctx.sleep("40d")
            return (ctx.now("end") - begin).days

        def test_it(fake_clock, fake_people):
            assert flow.options(wait=True).run(1) == 40
        """,
    )
    done = project.pytest()
    assert (done.code, done.passed) == (0, 1), done


def test_a_session_that_does_not_use_agentflow_imports_nothing_of_it(project: Project) -> None:
    project.write(
        "test_other.py",
        """
        import json, sys
        def test_other():
            print(json.dumps(sorted(name for name in sys.modules if name.startswith("agentflow") or name in ("openai", "httpx2", "pydantic"))))
        """,
    )
    done = project.pytest("-s", "-q", "test_other.py")
    assert done.code == 0, done
    line = next(line for line in done.text.splitlines() if line.startswith("["))
    assert json.loads(line.rstrip(".")) == ["agentflow", "agentflow.errors", "agentflow.pytest_plugin", "agentflow.rich"]


def test_what_a_killed_session_left_in_memory_is_removed_by_the_next_one(project: Project) -> None:
    project.write(
        "test_killed.py",
        """
        import os, signal
        from agentflow import step

        def test_killed():
            import asyncio
            async def main():
                await step("s", lambda: 1)
            asyncio.run(main())
            print(os.environ["AGENTFLOW_PATH"], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    project.write("test_fine.py", "def test_fine(): pass")
    killed = project.pytest("-s", "-q", "test_killed.py")
    left = Path(next(word for word in killed.text.split() if "agentflow-tests-" in word).lstrip("."))
    assert project.pytest("test_fine.py").code == 0
    assert not left.parent.exists()


@pytest.mark.parametrize("more", [(), ("-p", "tests.conftest")], ids=["users", "this suite"])
@pytest.mark.torture
def test_journals_of_finished_tests_are_closed(project: Project, more: tuple[str, ...]) -> None:
    project.write(
        "test_app.py",
        """
        import os
        import pytest
        from agentflow import configure, runs
        from agentflow.testing import FakeModel
        from app import greet

        @pytest.fixture(scope="module")
        def shared(tmp_path_factory):
            configure(path=tmp_path_factory.mktemp("shared"))
            with FakeModel(["Hello!"]):
                greet.run_sync("Ada")
            yield runs.list()[0]
            configure(path=None)

        @pytest.mark.parametrize("number", range(30))
        def test_it(number, tmp_path, fake_model, shared):
            assert [step.status for step in shared.steps] == ["completed"] * 2  # its journal is not this test's
            fake_model(["Hello, Ada!", "Hello, Bob!"])
            greet.run_sync("Ada")
            configure(path=tmp_path / "own")
            greet.run_sync("Bob")
            print(f"open: {len(os.listdir('/dev/fd'))}.")
        """,
    )
    done = project.pytest("-s", "-q", "-o", "filterwarnings=", *more)
    assert (done.code, done.passed) == (0, 30), done
    counts = [int(count) for count in re.findall(r"open: (\d+)\.", done.text)]
    assert len(counts) == 30 and max(counts[5:]) <= max(counts[:5]), counts


@pytest.mark.torture
def test_the_journal_in_memory_keeps_the_promises_of_the_one_on_disk() -> None:
    """The suite of the journal, over journals where the plugin puts them."""
    folder = Path(os.environ["AGENTFLOW_PATH"]).with_name("contract")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", f"--basetemp={folder}"]
    suites = [f"tests/test_journal{part}.py" for part in ("", "_in_runs")]
    done = subprocess.run([*command, *suites, *DESELECTED], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


# A fact about the environment's interpreter, not about where the journal is.
DESELECTED = ["--deselect", "tests/test_journal.py::test_opening_an_existing_journal_imports_no_diskcache"]
