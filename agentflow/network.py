"""Which hosts model calls may reach: ``AGENTFLOW_MODEL_HOSTS``. Tests set it, so that no test spends money by accident.

The variable holds host names separated by spaces. Empty, no call goes out at all; not set, all do. It reaches the
programs that a test starts too. What a ``FakeModel`` or a recording answers goes nowhere and is not asked about here.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from agentflow.errors import UsageError

VARIABLE = "AGENTFLOW_MODEL_HOSTS"

# What was refused in this process, in words: code under test may have swallowed the error.
refused: list[str] = []


def check(provider: str, url: str) -> None:
    """Refuse a call to a host that is not allowed, before anything is sent.

    Raises:
        UsageError: says what to do instead.
    """
    allowed = os.environ.get(VARIABLE)
    host = urlsplit(url).hostname or ""
    if allowed is None or host in allowed.split():
        return
    text = (
        f"{provider}: a model call was about to reach {host}, which {VARIABLE}={allowed!r} does not allow. Nothing was "
        "sent. In a test: script the answers with FakeModel([...]) (fixture fake_model), replay recorded ones with "
        "@pytest.mark.recorded, or, where it shall really be asked and paid for, write @pytest.mark.agentflow_live."
    )
    refused.append(text)
    raise UsageError(text)
