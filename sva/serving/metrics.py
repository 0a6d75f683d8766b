"""What a server counts, in the form that Prometheus reads."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("sva_requests", "Requests answered", ["path", "status"], registry=own)
        self.seconds = Histogram(
            "sva_request_seconds", "Seconds of whole requests", ["path"], buckets=_SECONDS, registry=own
        )
        self.first_token = Histogram(
            "sva_first_token_seconds", "Seconds to the first token", buckets=_SECONDS, registry=own
        )
        self.tokens_read = Counter("sva_prompt_tokens", "Prompt tokens read", registry=own)
        self.tokens_drawn = Counter("sva_completion_tokens", "Tokens drawn", registry=own)
        self.dispatched = Counter("sva_dispatched", "First passes by the label chosen", ["label"], registry=own)
        self.compiled = Counter("sva_compiled_programs", "Programs compiled, or read from the cache", registry=own)
        self.rows = Gauge("sva_rows_in_use", "Rows that decode", registry=own)
        self.waiting = Gauge("sva_waiting_samples", "Samples that wait for a row", registry=own)
        self.experts = Gauge("sva_experts", "Experts loaded", registry=own)

    def text(self) -> bytes:
        """All of them, as Prometheus' text format."""
        return generate_latest(self.registry)
