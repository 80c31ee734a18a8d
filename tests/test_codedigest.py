"""The digest of code: which edits count, how far it reaches, and that it is cheap to ask again."""

from __future__ import annotations

import functools
import gc
import importlib
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import types
import warnings
from pathlib import Path

import pytest

from agentflow import bytecode, codedigest
from agentflow.codedigest import changed_parts, code_of

ROOT = Path(__file__).parents[1]


def compiled(source, name="f", module="app", **names):
    scope = {"__name__": module, **names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        exec(compile(textwrap.dedent(source), "app.py", "exec", dont_inherit=True), scope)
    return scope[name]


def digest(source, **names):
    return code_of(compiled(source, **names)).digest


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Writes modules of a user's project and imports them."""
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(**sources):
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        for cached in tmp_path.glob("__pycache__/*"):
            cached.unlink()
        made.extend(sources)
        loaded = [importlib.import_module(name) for name in sources]
        return loaded[0] if len(loaded) == 1 else loaded

    yield make
    for name in made:
        sys.modules.pop(name, None)


SAME = {
    "comments, blank lines": ("def f(x):\n  return x + 1", "def f(x):\n\n  # why\n\n  return x + 1"),
    "docstring": ("def f(x):\n  return x", "def f(x):\n  'words'\n  return x"),
    "edited docstring": ("def f(x):\n  'a'\n  return x", "def f(x):\n  'b'\n  return x"),
    "annotations": ("def f(x):\n  y = 1\n  return x + y", "def f(x: int) -> int:\n  y: int = 1\n  return x + y"),
    "renamed local": ("def f(x):\n  a = x\n  return a", "def f(x):\n  b = x\n  return b"),
    "renamed argument": ("def f(x, y):\n  return x - y", "def f(z, a):\n  return z - a"),
    "quotes, parentheses": ("def f(x):\n  return x + 'a'", 'def f(x):\n  return (x + "a")'),
    "pass": ("def f(x):\n  return x", "def f(x):\n  pass\n  return x"),
    "set literal": ("def f(x):\n  return x in {'a', 'b', 'c'}", "def f(x):\n  return x in {'c', 'b', 'a'}"),
    "renamed in a nested function": (
        "def f(b, a):\n  return lambda: b - a", "def f(x, y):\n  return lambda: x - y"),
    "renamed in a loop with try": (
        "def f(b):\n  for a in b:\n    try: a()\n    except ValueError as e: print(e)",
        "def f(x):\n  for i in x:\n    try: i()\n    except ValueError as y: print(y)"),
}  # fmt: skip

DIFFERENT = {
    "constant": ("def f(x):\n  return x + 1", "def f(x):\n  return x + 2"),
    "type of a constant": ("def f(x):\n  return x + 1", "def f(x):\n  return x + 1.0"),
    "bool for int": ("def f(x):\n  return x, 1", "def f(x):\n  return x, True"),
    "text": ("def f(x):\n  return 'a' + x", "def f(x):\n  return 'b' + x"),
    "operator": ("def f(x):\n  return x + 1", "def f(x):\n  return x - 1"),
    "comparison": ("def f(x):\n  return x < 1", "def f(x):\n  return x > 1"),
    "swapped operands": ("def f(x, y):\n  return x - y", "def f(x, y):\n  return y - x"),
    "swapped operands in a nested function": (
        "def f(a, b):\n  return lambda: a - b", "def f(a, b):\n  return lambda: b - a"),
    "another global": ("def f(x):\n  return min(x)", "def f(x):\n  return max(x)"),
    "another attribute": ("def f(x):\n  return x.a", "def f(x):\n  return x.b"),
    "keyword name": ("def f(x):\n  return x(a=1)", "def f(x):\n  return x(b=1)"),
    "branch target": ("def f(x, y):\n  if x: y()\n  y()", "def f(x, y):\n  if x:\n    y()\n    y()"),
    "try scope": (
        "def f(x):\n  try: x()\n  except ValueError: pass\n  x()", "def f(x):\n  try:\n    x()\n    x()\n  except ValueError: pass"),
    "what a handler covers": (
        "def f(x, y):\n  while True:\n    try:\n      x()\n      y()\n    except ValueError: pass",
        "def f(x, y):\n  while True:\n    x()\n    try:\n      y()\n    except ValueError: pass"),
    "where a loop goes back to": (
        "def f(a, b):\n  while 1:\n    a()\n    b()", "def f(a, b):\n  a()\n  while 1:\n    b()"),
    "nested constant": ("def f():\n  return lambda: 1", "def f():\n  return lambda: 2"),
    "async": ("def f(x):\n  return x", "async def f(x):\n  return x"),
    "keyword-only name": ("def f(*, a):\n  return a", "def f(*, b):\n  return b"),
    "argument kind": ("def f(a):\n  return a", "def f(*a):\n  return a"),
    "negative zero": ("def f():\n  return 0.0", "def f():\n  return -0.0"),
    "tuple for list of constants": ("def f():\n  return (1, (2, 3))", "def f():\n  return (1, (2, 3.0))"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_an_edit_that_computes_the_same_changes_nothing(case):
    old, new = SAME[case]
    assert digest(old) == digest(new)


@pytest.mark.parametrize("case", DIFFERENT)
def test_an_edit_that_computes_something_else_counts(case):
    old, new = DIFFERENT[case]
    assert digest(old) != digest(new)


@pytest.mark.parametrize("python", ["3.12", "3.13", "3.14"])
def test_the_same_edits_count_on_other_pythons(python, tmp_path):
    python_path = os.environ.get(f"PYTHON_{python.replace('.', '_')}") or shutil.which(f"python{python}")
    works = python_path and subprocess.run([python_path, "-c", ""], capture_output=True).returncode == 0
    if not python_path or not works or sys.version_info[:2] == tuple(map(int, python.split("."))):
        pytest.skip(f"no other Python {python} here: name one in PYTHON_{python.replace('.', '_')}")
    # a stand-in with the two calls the modules make of it: this is about bytecode, not about encoding
    (tmp_path / "orjson.py").write_text(
        "import json\nOPT_SORT_KEYS = 1\nclass Fragment:\n  def __init__(s, b): s.b = b\n"
        "def dumps(v, option=None, default=None):\n"
        "  return json.dumps(v, sort_keys=True, separators=(',', ':'), default=lambda x: json.loads(x.b)).encode()\n"
        "loads = json.loads\n"
    )
    check = f"""
        import warnings; warnings.simplefilter("ignore")
        from agentflow.codedigest import code_of
        from agentflow.capture import capture
        same, different = {list(SAME.items())!r}, {list(DIFFERENT.items())!r}
        def digest(source):
            scope = {{"__name__": "app"}}
            exec(compile(source, "app.py", "exec"), scope)
            return code_of(scope["f"]).digest
        wrong = [c for c, (a, b) in same if digest(a) != digest(b)] + [c for c, (a, b) in different if digest(a) == digest(b)]
        def given(a, b): return lambda: a - b
        def renamed(z, y): return lambda: z - y
        def helper(x): return RATE * x
        RATE = 2
        def nested(a, b): return lambda: [lambda: (b, a), a]
        assert capture(given(1, 2)).digest == capture(renamed(1, 2)).digest
        assert capture(nested(1, 2)).names == ("b", "a"), capture(nested(1, 2)).names
        assert [n for n, _ in code_of(lambda: helper(1)).parts] == ["__main__.<lambda>", "__main__.RATE", "__main__.helper"]
        class Agent:
            def __init__(self, topic): self.topic = topic; self.calls = 0
            def plan(self): self.calls += 1; return super().__str__() + self.topic
        cats, dogs = Agent("cats"), Agent("dogs")
        assert capture(cats.plan).digest != capture(dogs.plan).digest
        def planned(agent): return lambda: agent.plan()
        assert capture(planned(cats)).digest == capture(planned(Agent("cats"))).digest != capture(planned(dogs)).digest
        print(wrong)
    """
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([python_path, "-c", textwrap.dedent(check)], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]


# -- reach


def test_helpers_and_constants_two_levels_down_are_reached(modules):
    helpers = "RATE = {rate}\ndef deep(x):\n    return x * RATE {tail}\nunused = {unused}\n"
    app = (
        "import lib1\nfrom lib1 import deep\ndef f(x):\n    return middle(x)\ndef middle(x):\n    return lib1.deep(x)\n"
    )

    def build(rate=2, tail="", unused=1):
        lib, a = modules(lib1=helpers.format(rate=rate, tail=tail, unused=unused), app1=app)
        return code_of(a.f)

    base = build()
    assert [n for n, _ in base.parts] == ["app1.f", "app1.middle", "lib1.RATE", "lib1.deep"]
    assert build().digest == base.digest == build(unused=5).digest
    assert changed_parts(base.parts, build(rate=3).parts) == ["lib1.RATE changed"]
    assert changed_parts(base.parts, build(tail="+ 1").parts) == ["lib1.deep edited"]


def test_the_same_code_as_script_and_as_module_has_one_digest():
    source = "K = 1\ndef g(): return K\ndef f(): return g()"
    assert code_of(compiled(source, module="__main__")).digest == code_of(compiled(source, module="app")).digest


def test_a_constant_changed_in_place_or_rebound_is_noticed_on_the_next_call():
    f = compiled("def f(): return CONFIG['a'], N", CONFIG={"a": 1}, N=1)
    first = code_of(f).digest
    f.__globals__["CONFIG"]["a"] = 2
    second = code_of(f).digest
    f.__globals__["N"] = 2
    third = code_of(f).digest
    f.__globals__.update(CONFIG={"a": 1}, N=1)
    assert len({first, second, third}) == 3 and code_of(f).digest == first


def test_a_builtin_that_becomes_shadowed_is_noticed():
    f = compiled("def f(x): return max(x)")
    before = code_of(f).digest
    exec("def max(x): return 1", f.__globals__)
    assert code_of(f).digest != before


def test_code_replaced_inside_a_function_is_noticed():
    f = compiled("def g(): return 1\ndef f(): return g()")
    before = code_of(f).digest
    f.__globals__["g"].__code__ = compiled("def g(): return 2", "g").__code__
    assert code_of(f).digest != before


def test_one_code_object_with_two_globals_is_two_codes():
    f = compiled("def f(): return g()\ndef g(): return 1")
    other = types.FunctionType(f.__code__, {"__name__": "app", "g": compiled("def g(): return 2", "g")})
    assert code_of(f).digest != code_of(other).digest
    assert code_of(f).digest == code_of(f).digest != code_of(other).digest


def test_a_lambda_and_the_function_it_calls_notice_the_same_constant():
    f = compiled("RATE = 1\ndef compute(o): return o * RATE\nf = lambda: compute(1)")
    compute = f.__globals__["compute"]
    before = code_of(f).digest, code_of(compute).digest
    f.__globals__["RATE"] = 2
    assert code_of(f).digest != before[0] and code_of(compute).digest != before[1]


def test_installed_code_and_agentflow_are_not_reached():
    import json

    code = code_of(
        compiled("def f(x): return json.dumps(x), E(x), os.path.join(x)", json=json, E=codedigest.Encoder, os=os)
    )
    assert [n for n, _ in code.parts] == ["app.f"]


def test_objects_without_data_form_count_by_type_only():
    f = compiled("def f(): return client", client=threading.Lock())
    before = code_of(f).digest
    f.__globals__["client"] = threading.Lock()
    assert code_of(f).digest == before
    f.__globals__["client"] = threading.Event()
    assert code_of(f).digest != before


def test_a_global_that_the_code_fills_itself_is_state_and_not_code():
    f = compiled("""
        client, n = None, 0
        def get():
            global client, n
            n += 1
            client = client or "made"
            return client
        def f(): return get()
    """)
    before = code_of(f)
    f()
    assert code_of(f).digest == before.digest and [name for name, _ in before.parts] == ["app.f", "app.get"]


def test_code_that_is_redefined_is_forgotten():
    scope = {"__name__": "app", "DATA": [1]}
    sizes = []
    for n in range(3):
        exec(f"def f(): return DATA, {n}", scope)
        code_of(scope["f"])
        gc.collect()
        sizes.append((len(codedigest._known), len(bytecode._shapes)))
    assert sizes[0] == sizes[1] == sizes[2]


def test_methods_named_are_reached_and_others_are_not():
    source = """
        class Agent:
            PROMPT = {prompt!r}
            def __init__(self, t): self.t = t
            def plan(self): return self.words()
            def words(self): return self.PROMPT {words}
            def unused(self): return {unused}
        agent = Agent(1)
        def f(x): return Agent(x).plan()
        def bound(): return agent.plan()
        method = agent.plan
    """
    for name in ("f", "bound", "method"):

        def build(prompt="p", words="", unused=1):
            return code_of(compiled(source.format(prompt=prompt, words=words, unused=unused), name)).digest

        assert build() == build() == build(unused=2)
        assert len({build(), build(prompt="q"), build(words="+ 'x'")}) == 3, name


def test_fields_of_a_dataclass_or_model_are_code(monkeypatch):
    monkeypatch.setitem(sys.modules, "app_fields", types.ModuleType("app_fields"))
    source = """
        import dataclasses, pydantic
        @dataclasses.dataclass
        class D:
            a: int = {default}
        class M(pydantic.BaseModel):
            {doc}
            d: list[D] = pydantic.Field(default=None, description={words!r})
        def f(): return M
    """

    def build(default=1, doc="'x'", words="w", source=source):
        return digest(source.format(default=default, doc=doc, words=words), module="app_fields")

    assert build() == build()
    assert len({build(), build(default=2), build(doc="'y'"), build(words="v")}) == 4
    postponed = "from __future__ import annotations" + textwrap.dedent(source)
    monkeypatch.setattr(
        sys.modules["app_fields"], "D", compiled(source.format(default=1, doc="''", words=""), "D"), raising=False
    )
    assert "app.D" in dict(
        code_of(compiled(postponed.format(default=1, doc="''", words=""), module="app_fields")).parts
    )


def test_wrappers_partials_and_closures_are_followed():
    source = """
        import functools
        def helper(x): return x + {n}
        def deco(fn):
            @functools.wraps(fn)
            def inner(*a): return fn(*a)
            return inner
        @deco
        def wrapped(x): return helper(x)
        @functools.lru_cache
        def cached(x): return helper(x)
        part = functools.partial(helper, 1)
        def outer():
            def local(x): return helper(x)
            return lambda: local(1)
        local = outer()
        def calls(x): return wrapped(x), cached(x), part()
        class C:
            def __call__(self, x): return helper(x)
        instance = C()
        tools = [helper]
        def uses(): return [t(1) for t in tools]
    """
    for name in ("wrapped", "cached", "part", "local", "calls", "instance", "uses"):
        a, b, c = (code_of(compiled(source.format(n=n), name)).digest for n in (1, 1, 2))
        assert a == b != c, name


def test_functions_among_the_arguments_are_reached_when_asked():
    a, b = compiled("f = lambda: 1"), compiled("f = lambda: 2")
    use = compiled("def f(g): return g()")
    assert code_of(use, (a,)).digest != code_of(use, (b,)).digest


def test_defaults_of_helpers_are_code():
    assert digest("def g(x=1): return x\ndef f(): return g()") != digest("def g(x=2): return x\ndef f(): return g()")


def test_imports_inside_functions_are_resolved_without_importing(modules):
    modules(lib2="def deep(): return 1\n")
    f = compiled("def f():\n  from lib2 import deep\n  import lib2, never_imported_here\n  return deep(), lib2.deep()")
    code = code_of(f)
    assert [n for n, _ in code.parts] == ["app.f", "lib2.deep"]
    assert "never_imported_here" not in sys.modules
    modules(lib2="def deep(): return 2\n")
    assert code_of(f).digest != code.digest


def test_mutual_recursion_ends():
    assert digest("def g(n): return f(n)\ndef f(n): return g(n - 1) if n else f(0)")


def test_changes_are_told_in_words():
    old = [("app.charge", "1"), ("app.RATE", "1"), ("app.gone", "1"), ("prompts/a.md", "1")]
    new = [("app.charge", "2"), ("app.RATE", "2"), ("app.helper", "1"), ("prompts/a.md", "2")]
    assert changed_parts(old, new) == [
        "app.RATE changed", "app.charge edited", "app.gone removed", "app.helper added", "prompts/a.md changed"
    ]  # fmt: skip


# -- model calls and prompts


def model_module():
    def generate_content(prompt): ...

    generate_content.__agentflow_model_call__ = True
    module = types.ModuleType("agentflow_stand_in")
    module.generate_content = module.generateContent = generate_content
    return module


@pytest.mark.parametrize(
    "source",
    [
        "def f(): return generate_content('x')",
        "def f(): return af.generate_content('x')",
        "def f(): return af.generateContent('x')",
        "def g(): return h()\ndef h(): return af.generate_content('x')\ndef f(): return g()",
        "def f():\n  from agentflow_stand_in import generate_content\n  return generate_content('x')",
        "def f():\n  import agentflow_stand_in as x\n  return x.generate_content('x')",
        "class A:\n  def plan(self): return generate_content('x')\nf = A().plan",
        "def outer(m):\n  return lambda: m('x')\nf = outer(generate_content)",
        "def outer(m):\n  return lambda: m.generate_content('x')\nf = outer(af)",
        "import functools\nf = functools.partial(generate_content, 'x')",
        "def f(): return [generate_content(x) for x in 'ab']",
    ],
)
def test_a_model_call_is_recognised_however_it_is_reached(source, monkeypatch):
    af = model_module()
    monkeypatch.setitem(sys.modules, "agentflow_stand_in", af)
    assert code_of(compiled(source, af=af, generate_content=af.generate_content)).reaches_model


@pytest.mark.parametrize("package", ["agentflow", "agentflow.sync"])
def test_a_model_call_imported_inside_the_function_is_recognised_before_anything_has_loaded_it(package):
    program = (
        f"import sys, {package}\n"
        "from agentflow.codedigest import code_of\n"
        "def ask():\n"
        f"    from {package} import generate_content\n"
        "    return generate_content('x')\n"
        "assert 'agentflow.aicall' not in sys.modules\n"
        "assert code_of(ask).reaches_model\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_code_without_a_model_call_is_not_an_ai_step():
    af = model_module()
    source = "def unused(): return af.generate_content('x')\ndef f(): return 'generate_content'"
    assert not code_of(compiled(source, af=af)).reaches_model


def test_a_decorated_step_is_followed_to_its_function():
    class Step:
        __agentflow_step__ = True

        def __init__(self, fn):
            self.fn = fn

    af = model_module()
    f = compiled("@Step\ndef charge(): return af.generate_content('x')\ndef f(): return charge()", Step=Step, af=af)
    assert code_of(f).reaches_model and "app.charge" in dict(code_of(f).parts)
    assert code_of(f.__globals__["charge"]).reaches_model


def test_what_a_call_is_given_is_reached_whatever_holds_it():
    class Step:
        __agentflow_step__ = True

        def __init__(self, fn):
            self.fn = fn

    class Context:
        __agentflow_context__ = True

        def __init__(self):
            self.fn = helper

    class Client:
        def __call__(self): ...

    source = "def helper(): return 1\n"
    helper = compiled(source, name="helper")
    for given in (
        "def f(x=helper): return x()",
        "def f(*args): return args\nf.__wrapped__ = helper",
        "def outer(x):\n  return lambda: x()\nf = outer(helper)",
    ):
        assert "app.helper" in dict(code_of(compiled(source + given)).parts), given
    takes = compiled("def f(*args): return args")
    for passed in ((helper,), ("a", Step(helper)), ([helper],), ({"a": helper},)):
        assert "app.helper" in dict(code_of(takes, passed).parts), passed
    assert "app.helper" in dict(code_of(takes, (), {"x": helper}).parts)
    assert "app.helper" not in dict(code_of(takes, ("a", Context())).parts)
    client = Client()
    assert not code_of(takes, (client,)).reaches_model
    client.__agentflow_model_call__ = True
    assert code_of(takes, (client,)).reaches_model


def test_an_edited_prompt_file_changes_the_code(monkeypatch):
    def load_prompt(name, **names): ...

    load_prompt.__agentflow_prompt_loader__ = True
    files = {"triage": "1"}
    monkeypatch.setattr(codedigest, "prompt_part", files.get)
    f = compiled("def f(x): return load_prompt('triage', x=x)", load_prompt=load_prompt)
    before = code_of(f)
    assert before.prompts == ("triage",) and ("prompts/triage.md", "1") in before.parts
    files["triage"] = "2"
    assert changed_parts(before.parts, code_of(f).parts) == ["prompts/triage.md changed"]


def test_the_description_of_a_tool_handed_to_a_model_is_code():
    af = model_module()
    source = "def look(x):\n  {doc!r}\n  return x\ndef f(): return af.generate_content('x', tools=[look])"
    assert digest(source.format(doc="a"), af=af) != digest(source.format(doc="b"), af=af)


# -- cost


def test_asking_again_resolves_nothing(monkeypatch):
    f = compiled("RATE = 1\ndef g(): return RATE\ndef f(): return g()")
    first = code_of(f)
    monkeypatch.setattr(codedigest, "_Reach", lambda: pytest.fail("resolved again"))
    assert code_of(f) is first
    assert code_of(functools.partial(f)) is first
