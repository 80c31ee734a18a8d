"""Secrets are masked wherever text leaves the journal, and ordinary text is left alone."""

import base64
import hashlib
import json
import re
import subprocess
import sys
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentflow.errors import UsageError
from agentflow.redact import redact, redact_value, set_extra

# put together here, so that no scanner takes this file for a leak
SECRETS = {
    "openai-key": ["sk-" + "proj-" + "aB3_dE-6" * 5, "sk-" + "a1B2c3D4" * 6, "sk-" + "svcacct-" + "Zz09" * 8],
    "anthropic-key": ["sk-" + "ant-api03-" + "xY7_" * 12],
    "openrouter-key": ["sk-" + "or-v1-" + "0af9" * 16],
    "aws-key": ["AKIA" + "IOSFODNN7EXAMPLE"],
    "github-token": ["ghp" + "_" + "aB3d" * 9, "github" + "_pat_" + "11ABCDEFG0" * 4],
    "slack-token": ["xox" + "b-" + "123456789012-abcdefABCDEF"],
    "google-key": ["AIza" + "Sy0-_" * 7],
    "stripe-key": ["sk" + "_live_" + "4eC39HqLyjWDarjtT1zdp7dc"],
    "jwt": ["eyJ" + "hbGciOiJIUzI1NiJ9." + "eyJ" + "zdWIiOiIxMjM0NTY3ODkwIn0." + "dozjgNryP4J3jVmNHl0w5N"],
}


@pytest.fixture(autouse=True)
def _no_extra():
    yield
    set_extra(None)


@pytest.mark.parametrize(("name", "secret"), [(n, s) for n, many in SECRETS.items() for s in many])
def test_known_key_formats_are_masked_in_every_surrounding(name, secret):
    mask = f"[redacted:{name}]"
    assert redact(secret) == mask
    assert redact(f"Incorrect key provided: {secret}.").startswith(f"Incorrect key provided: {mask}")
    assert redact(json.dumps({"text": f'say "{secret}"'})) == json.dumps({"text": f'say "{mask}"'})
    assert secret not in redact(f"https://host/path?x={secret}&y=1")
    assert secret not in redact(f"\x1b[31m({secret})\n{secret}")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Authorization: Bearer abcdefghij0123456789", "Authorization: Bearer [redacted:bearer-token]"),
        ('{"authorization": "Basic dXNlcjpwYXNz"}', '{"authorization": "Basic [redacted:authorization]"}'),
        ("api_key='k9-secret-value'", "api_key='[redacted:api-key]'"),
        ("OTHER_API_KEY=k9secretvalue make", "OTHER_API_KEY=[redacted:api-key] make"),
        ('{"x-api-key": "0123456789abcdef"}', '{"x-api-key": "[redacted:api-key]"}'),
        ('"{\\"x-api-key\\": \\"0123456789abcdef\\"}"', '"{\\"x-api-key\\": \\"[redacted:api-key]\\"}"'),
        ("client_secret=s3cr3tv4lue&next=1", "client_secret=[redacted:secret]&next=1"),
        ("postgresql://app:hunter2@db/flows", "postgresql://app:[redacted:password]@db/flows"),
    ],
)
def test_secrets_known_by_their_name_are_masked_and_the_name_stays(text, masked):
    assert redact(text) == masked


def test_private_key_blocks_are_masked_whole_also_cut_off_and_inside_json():
    body = "\n".join(base64.b64encode(bytes([i] * 48)).decode() for i in range(9))
    begin, end = ("-----" + word + " RSA PRIVATE " + "KEY-----" for word in ("BEGIN", "END"))
    block = f"{begin}\n{body}\n{end}"
    assert redact(f"a {block} b") == "a [redacted:private-key] b"
    assert redact(json.dumps({"pem": block})) == '{"pem": "[redacted:private-key]"}'
    assert body.splitlines()[3] not in redact(f"{begin}\n{body}")


def test_values_of_secret_environment_variables_are_masked(monkeypatch):
    monkeypatch.setenv("WEATHER_API_KEY", 'pläin "words" here')
    monkeypatch.setenv("DB_PASSWORD", "abcd;efgh")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("A_TOKEN", "inner-part")
    monkeypatch.setenv("B_TOKEN", "an inner-part and more")
    assert redact("an inner-part and more") == "[redacted:B_TOKEN]"
    monkeypatch.setenv("HOME_TOWN", "Reykjavik-Island")
    assert redact('key pläin "words" here!') == "key [redacted:WEATHER_API_KEY]!"
    assert redact(json.dumps({"k": 'pläin "words" here'})) == '{"k": "[redacted:WEATHER_API_KEY]"}'
    assert redact("password=abcd;efgh abc") == "password=[redacted:DB_PASSWORD] abc"
    assert redact("Reykjavik-Island") == "Reykjavik-Island"


@pytest.mark.parametrize(
    "text",
    [
        "The risk-averse desk-bound task-runner asked: is the API key set? Then pass it on.",
        "sk-learn, sk-fading-circle-with-a-very-long-css-class-name, ask-me-anything-about-it-please",
        "Use a Bearer token; the bearer of this letter; bearer authentication-is-required here",
        "api_key=None, api_key=os.environ['OPENAI_API_KEY'], api_key=$KEY, api_key=<your key>, password: required",
        "max_tokens=12345678, input_tokens: 123456789, cache_key=0123456789abcdef, keyboard: 1234567890",
        str(uuid.UUID("12345678-1234-5678-1234-567812345678")),
        hashlib.sha256(b"x").hexdigest(),
        hashlib.md5(b"x").hexdigest().upper(),
        base64.b64encode(bytes(range(256))).decode(),
        "run process-order-3f9a · completed · 5 steps: 4 replayed, 1 run · paid $0.0021",
        "req_011CSHoEeqs5C35K2UUqR7Fy resp_67ccd2bed1ec8190b14f964abc0542670bb6a6b452d3795b chatcmpl-9vX2",
        "http://localhost:8000/path?a=b me@example.org 12:30@noon",
        "-----BEGIN CERTIFICATE-----",
    ],
)
def test_ordinary_text_ids_and_hashes_are_left_alone(text):
    assert redact(text) == text


def test_trees_keep_their_shape_and_lose_what_a_secret_name_holds():
    secret = SECRETS["openai-key"][0]
    tree = {
        "headers": {"Authorization": ["Bearer x"], "X-Api-Key": "short", "Accept": "a"},
        "body": [f"my key is {secret}", 7, None, ("t", 1.5)],
        "openai_api_key": secret,
        "usage": {"input_tokens": 5, "total_tokens": 12},
        3: {"password": "", "db_password": "pw"},
    }
    assert redact_value(tree) == {
        "headers": {"Authorization": ["[redacted:authorization]"], "X-Api-Key": "[redacted:api-key]", "Accept": "a"},
        "body": ["my key is [redacted:openai-key]", 7, None, ("t", 1.5)],
        "openai_api_key": "[redacted:openai-key]",
        "usage": {"input_tokens": 5, "total_tokens": 12},
        3: {"password": "", "db_password": "[redacted:password]"},
    }
    assert tree["openai_api_key"] == secret


def test_users_add_patterns_names_or_a_function():
    set_extra([r"ACME-\d+", re.compile("x*")])
    assert redact("order ACME-12") == "order [redacted:custom]"
    set_extra({"customer": r"C\d{4}"})
    assert redact("C1234 ACME-12") == "[redacted:customer] ACME-12"
    set_extra(str.upper)
    assert redact("shout") == "SHOUT"
    set_extra(None)
    assert redact("ACME-12") == "ACME-12"
    with pytest.raises(UsageError, match="no regular expression"):
        set_extra(["("])
    set_extra(lambda text: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(UsageError, match="must return text"):
        redact("x")


PIECES = [s for many in SECRETS.values() for s in many] + [
    "Bearer abcdefghij0123456789",
    "api_key=abcd1234x",
    " ",
    '"',
    "\\",
    "a",
    ",",
]


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=8).map("".join))
def test_redacting_twice_changes_nothing(text):
    set_extra({"redacted": "redacted|key"})
    once = redact(text)
    assert redact(once) == once


def test_a_megabyte_without_separators_is_read_once():
    import time

    # A pattern that goes back for every character would take hours; that is what is ruled out, not a slow machine.
    for text in ("a-" * 500_000, "x" * 1_000_000, "eyJ" * 300_000, "bearer " * 150_000, "://:" * 250_000):
        started = time.process_time()
        redact(text)
        assert time.process_time() - started < 60


@pytest.mark.parametrize("text", ["{} · completed", "ſ {}", "· {} ·\n", "naïve {}"])
@pytest.mark.parametrize(("name", "secret"), [(n, s) for n, many in SECRETS.items() for s in many])
def test_a_secret_is_masked_whatever_letters_stand_beside_it(text, name, secret):
    assert redact(text.format(secret)) == text.format(f"[redacted:{name}]")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("paſſword=k9-hidden-value", "paſſword=[redacted:paſſword]"),
        ("api_\u212aey=k9-hidden-value", "api_\u212aey=[redacted:api-key]"),
        ("Authorization: BAS\u0130C dXNlcjpwYXNz", "Authorization: BAS\u0130C [redacted:authorization]"),
        ("authorization: bas\u0131c dXNlcjpwYXNz", "authorization: bas\u0131c [redacted:authorization]"),
    ],
)
def test_letters_that_count_as_others_where_case_is_ignored_do_not_hide_a_name(text, masked):
    assert redact(text) == masked


def test_a_line_that_holds_nothing_secret_compiles_no_pattern():
    program = (
        "import re\n"
        "from agentflow.redact import redact\n"
        "def compiled(*args): raise AssertionError(args)\n"
        "re.compile = compiled\n"
        "line = 'report-3f9a · completed · 5 steps: 4 replayed, 1 run · paid $0.0021, saved $0.0143'\n"
        "assert redact(line) == line\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
