"""The pytest plugin: a journal for every test, no model call by accident, scripted models, recorded replies.

It comes with the package and costs a session that does not use agentflow two environment variables and an empty
directory: everything else is imported when a test asks for it. ``-p no:agentflow.pytest_plugin`` leaves it out.

- Every test has a journal of its own, in memory where there is a file system for that (``/dev/shm``), else in the
  temporary directory; ``AGENTFLOW_PATH`` names it, also for programs that the test starts. A test that wants another
  one sets that variable or calls ``configure(path=...)``. With xdist each worker has its own.
- No model call reaches the network: ``@pytest.mark.agentflow_live`` lets those of a test through,
  ``agentflow_live("127.0.0.1")`` those to some hosts, the ini option ``agentflow_hosts`` those of all tests.
- ``@pytest.mark.recorded`` replays recorded replies (``--agentflow-record=none|once|all``), see ``recordings.py``.
- A step that changes a value it was given fails (``agentflow_strict = false`` in the ini file: it is only said).
- Fixtures: ``fake_model``, ``fake_people``, ``fake_clock``.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from agentflow.clock import FakeClock
    from agentflow.people import FakePeople
    from agentflow.recordings import Recording
    from agentflow.testing import FakeModel

_ROOM = 512 * 1024 * 1024  # bytes; a container may have a memory file system too small for a larger test
_PREFIX = "agentflow-tests-"
_HOSTS = "AGENTFLOW_MODEL_HOSTS"
_SESSION = pytest.StashKey["_Session"]()
_RECORDING = pytest.StashKey["Recording"]()
_PASSED = pytest.StashKey[bool]()
_LIVE = "agentflow_live(*hosts): model calls of this test reach the network, or only these hosts; they cost money"
_RECORDED = "recorded(path=None): replies come from a recording, <test file's folder>/recordings/<file>/<test>.json"


class _Session:
    """The folder of this process's journals, and the environment as it was before."""

    def __init__(self, hosts: list[str], strict: bool) -> None:
        root = _memory() or Path(tempfile.gettempdir())
        _sweep(root)
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        self._alive = _hold(self.folder / "alive")
        self.hosts = hosts
        self._count = 0
        self._before = set_environment(
            {
                "AGENTFLOW_PATH": str(self.folder / "session"),
                _HOSTS: " ".join(hosts),
                "AGENTFLOW_STRICT": "1" if strict else None,
            }
        )

    def next_folder(self) -> Path:
        self._count += 1
        return self.folder / str(self._count)

    def close(self) -> None:
        _remove(self.folder)
        os.close(self._alive)
        set_environment(self._before)


def set_environment(values: dict[str, str | None]) -> dict[str, str | None]:
    """Set variables, None removes one; what they were before."""
    before = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return before


def _memory() -> Path | None:
    place = Path("/dev/shm")
    try:
        found = os.statvfs(place)
    except OSError:
        return None
    roomy = found.f_bavail * found.f_frsize >= _ROOM
    return place if roomy and os.access(place, os.W_OK | os.X_OK) else None


def _hold(file: Path) -> int:
    """A lock that lasts as long as this process."""
    import fcntl

    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _sweep(root: Path) -> None:
    """Remove what killed sessions have left: in memory it would stay until the next boot."""
    for folder in root.glob(f"{_PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid() or not (folder / "alive").exists():
                continue
            descriptor = _hold(folder / "alive")
        except OSError:
            continue  # of a session that is alive, or gone meanwhile
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _forget(folder: Path) -> None:
    """Close the journals there: each holds files open, and a long session has many tests."""
    if "agentflow.scratch" in sys.modules:
        sys.modules["agentflow.scratch"].forget(folder)


def _remove(folder: Path) -> None:
    _forget(folder)
    shutil.rmtree(folder, ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("agentflow").addoption(
        "--agentflow-record",
        choices=("none", "once", "all"),
        default="none",
        help="tests marked recorded: none asks nobody, once asks what is not recorded yet, all everything anew",
    )
    parser.addini("agentflow_hosts", "hosts that model calls of all tests may reach", type="args", default=[])
    parser.addini("agentflow_strict", "a step that changes what it was given fails", type="bool", default=True)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _LIVE)
    config.addinivalue_line("markers", _RECORDED)
    config.stash[_SESSION] = _Session(config.getini("agentflow_hosts"), config.getini("agentflow_strict"))
    config.pluginmanager.register(_Unused(), "agentflow-unused")


def pytest_unconfigure(config: pytest.Config) -> None:
    session = config.stash.get(_SESSION, None)
    if session is not None:
        session.close()


@pytest.fixture(autouse=True)
def _agentflow(request: pytest.FixtureRequest) -> Iterator[None]:
    """A journal, and no model call that the test did not ask for."""
    session = request.config.stash[_SESSION]
    folder = session.next_folder()
    environment: dict[str, str | None] = {"AGENTFLOW_PATH": str(folder)}
    live = request.node.get_closest_marker("agentflow_live")
    if live is not None:
        environment[_HOSTS] = " ".join([*session.hosts, *live.args]) if live.args else None
    elif request.node.get_closest_marker("vcr") and request.config.pluginmanager.hasplugin("recording"):
        environment[_HOSTS] = None  # pytest-recording lets nothing through that it was not told to record
    before = set_environment(environment)
    recording = _recording(request.node)
    if recording is not None:
        request.node.stash[_RECORDING] = recording.__enter__()
    settings = getattr(sys.modules.get("agentflow.settings"), "settings", None)
    kept = (settings.path, settings.clock) if settings is not None else (None, None)
    if settings is not None:
        settings.path = None  # what configure(path=...) of an imported module has set is not this test's
    yield
    if recording is not None:
        recording.close(complete=_PASSED in request.node.stash)
    settings = getattr(sys.modules.get("agentflow.settings"), "settings", None)
    if settings is not None:
        settings.path, settings.clock = kept
    set_environment(before)
    if folder.exists():
        _remove(folder)
    own = getattr(request.node, "funcargs", {}).get("tmp_path")
    if own is not None:
        _forget(own)


def _recording(item: pytest.Item) -> Recording | None:
    """What a test's ``recorded`` mark asks for."""
    mark = item.get_closest_marker("recorded")
    if mark is None:
        return None
    from agentflow.recordings import Recording

    named = mark.args[0] if mark.args else mark.kwargs.get("path")
    path = item.path.parent / named if named is not None else _beside(item)
    mode = item.config.getoption("--agentflow-record")
    if named is not None and Path(named).suffix in (".yaml", ".yml"):
        mode = "none"  # a cassette is read, whatever is recorded anew
    return Recording(path, mode, command=f"pytest {shlex.quote(item.nodeid)} --agentflow-record=once")


def _beside(item: pytest.Item) -> Path:
    """The file of a test's recording; names that no file can have get a digest."""
    name = ".".join(item.nodeid.split("::")[1:])
    safe = re.sub(r"[^\w.\[\]=,+-]", "-", name)[:120]
    if safe != name:
        import hashlib

        safe += f"-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return item.path.parent / "recordings" / item.path.stem / f"{safe}.json"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test fails for a call that was refused or is not recorded, also where its code swallowed the error.

    Where it did not, the frames of agentflow and of the SDK would bury what is to be read: the line of the user's own
    code that asked stands below it instead.
    """
    _refused().clear()
    where = ""
    try:
        yield
    except Exception as error:
        if not any(words in str(error) for words in _unanswered(item)):
            raise
        where = _own_line(item, error)
    words = _unanswered(item)
    _refused().clear()
    if words:
        pytest.fail(words[0] + where, pytrace=False)
    item.stash[_PASSED] = True


def _unanswered(item: pytest.Item) -> list[str]:
    recording = item.stash.get(_RECORDING, None)
    return [*_refused(), *(recording.missing if recording is not None else ())]


def _own_line(item: pytest.Item, error: BaseException) -> str:
    """The innermost line of the project's code on the way to an error."""
    own = ""
    trace = error.__traceback__
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        installed = "site-packages" in file.parts or file.is_relative_to(Path(__file__).parent)
        if file.is_relative_to(item.config.rootpath) and not installed:
            own = f"\nAsked in {file.relative_to(item.config.rootpath)}, line {trace.tb_lineno}."
        trace = trace.tb_next
    return own


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report: Any = yield
    recording = item.stash.get(_RECORDING, None)
    more = recording.missing[1:] if recording is not None else []
    if report.when == "call" and more and report.failed:
        report.sections.append(("agentflow: not recorded either", "\n\n".join(more)))
    elif report.when == "teardown" and recording is not None and _PASSED in item.stash:
        # On the report, because with xdist another process writes the summary.
        report.agentflow_unused = [f"{recording.path}: {words}" for words in recording.unused()]
    return report


class _Unused:
    """Says at the end which recorded replies no passing test asked for."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.words += getattr(report, "agentflow_unused", ())

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.words:
            terminalreporter.section("agentflow: recorded replies that no test asked for", yellow=True)
            for line in self.words:
                terminalreporter.line(line)
            terminalreporter.line("Run these tests with --agentflow-record=once to remove them from their files.")


def _refused() -> list[str]:
    found: list[str] = getattr(sys.modules.get("agentflow.network"), "refused", [])
    return found


@pytest.fixture
def fake_model() -> Iterator[Callable[..., FakeModel]]:
    """``model = fake_model(["Hello!"])``: a ``FakeModel`` for the rest of the test, which checks it at the end."""
    from agentflow.testing import FakeModel

    made: list[FakeModel] = []

    def start(replies: Any, **options: Any) -> FakeModel:
        made.append(FakeModel(replies, **options).start())
        return made[-1]

    yield start
    for model in made[::-1]:
        model.stop()
    _check(made)


def _check(scripts: Sequence[FakeModel | FakePeople]) -> None:
    """Fails the test in the words of the first script that was not followed; where that is found says nothing."""
    problem = ""
    for script in scripts:
        try:
            script.check()
        except AssertionError as error:
            problem = problem or str(error)
    if problem:
        pytest.fail(problem, pytrace=False)


@pytest.fixture
def fake_people() -> Iterator[Callable[..., FakePeople]]:
    """``people = fake_people({"approve": True})``; ``people.run(workflow, ...)`` answers whoever is asked.

    ``events={"paid": {"order": 7}}`` scripts what runs wait for; one that is not received fails the test at its end.
    """
    from agentflow.people import FakePeople

    made: list[FakePeople] = []

    def start(*args: Any, **options: Any) -> FakePeople:
        made.append(FakePeople(*args, **options))
        return made[-1]

    yield start
    _check(made)


@pytest.fixture
def fake_clock() -> Iterator[FakeClock]:
    """A ``FakeClock`` for the test: ``fake_clock.advance("30d")``."""
    from agentflow.clock import FakeClock

    with FakeClock() as clock:
        yield clock
