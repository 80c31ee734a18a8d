"""The metrics of the GenAI conventions, 0.1.0: ``gen-ai-token-metrics.md`` and the pages of each operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opentelemetry.metrics import Meter

_SECONDS = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92]
_TOKENS = [1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864]

_DURATIONS = {
    "chat": "gen_ai.client.inference.duration",
    "embeddings": "gen_ai.client.embeddings.duration",
    "invoke_workflow": "gen_ai.invoke_agent.duration",
    "invoke_agent": "gen_ai.invoke_agent.duration",
    "execute_tool": "gen_ai.execute_tool.duration",
}
_USAGE = {
    "input_tokens": "gen_ai.client.inference.usage.input_tokens",
    "output_tokens": "gen_ai.client.inference.usage.output_tokens",
    "cached_tokens": "gen_ai.client.inference.usage.cache_read.input_tokens",
    "cache_write_tokens": "gen_ai.client.inference.usage.cache_write.input_tokens",
    "reasoning_tokens": "gen_ai.client.inference.usage.reasoning.output_tokens",
}
_PER_OPERATION = {
    ("chat", "input_tokens"): "gen_ai.client.inference.operation.input_tokens",
    ("chat", "output_tokens"): "gen_ai.client.inference.operation.output_tokens",
    ("embeddings", "input_tokens"): "gen_ai.client.embeddings.operation.input_tokens",
}
_OF_A_REQUEST = (
    "gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model", "gen_ai.response.model", "server.address",
    "server.port", "openai.response.service_tier", "error.type",
)  # fmt: skip


class Meters:
    """The instruments of one meter provider."""

    def __init__(self, meter: Meter) -> None:
        self._durations = {
            name: meter.create_histogram(
                name, "s", "How long an operation took.", explicit_bucket_boundaries_advisory=_SECONDS
            )
            for name in dict.fromkeys(_DURATIONS.values())
        }
        self._first_chunk = meter.create_histogram(
            "gen_ai.client.inference.time_to_first_chunk",
            "s",
            "How long a streamed answer took to begin.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._usage = {field: meter.create_counter(name, "{token}", "Tokens used.") for field, name in _USAGE.items()}
        self._per_operation = {
            which: meter.create_histogram(
                name, "{token}", "Tokens used by one operation.", explicit_bucket_boundaries_advisory=_TOKENS
            )
            for which, name in _PER_OPERATION.items()
        }

    def took(self, operation: str, seconds: float, attributes: Mapping[str, Any]) -> None:
        """Count how long something took, with those of its attributes that are the metric's too."""
        self._durations[_DURATIONS[operation]].record(seconds, attributes)

    def began(self, seconds: float, request: Mapping[str, Any]) -> None:
        """Count how long a streamed answer took to begin."""
        common = {name: value for name, value in request.items() if name != "error.type"}
        self._first_chunk.record(seconds, common)

    def used(self, operation: str, usage: Mapping[str, int] | None, modality: str, request: Mapping[str, Any]) -> None:
        """Count the tokens of one request; None where no reply came, which counts 0 of modality ``unknown``."""
        error = request.get("error.type")
        common = {name: value for name, value in request.items() if name != "error.type"}
        if operation == "chat":
            told = {**common, "gen_ai.token.modality": modality if usage else "unknown"}
            for field, counter in self._usage.items():
                counter.add((usage or {}).get(field, 0), told)
        for (which, field), histogram in self._per_operation.items():
            if which == operation:
                histogram.record((usage or {}).get(field, 0), common if error is None else request)


def of_a_request(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a request's attributes that its metrics have."""
    return {name: attributes[name] for name in _OF_A_REQUEST if name in attributes}
