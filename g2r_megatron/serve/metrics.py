"""What /metrics shows, in Prometheus' text format. Counters begin at 0 with the front."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The numbers of one front."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.starts = 0
        self.requests = Counter(
            "g2r_requests", "Requests answered", ["route", "status"], registry=self._registry
        )  # status 499: the client left
        self.seconds = Histogram(
            "g2r_request_seconds", "Time to the answer", ["route"], buckets=SECONDS, registry=self._registry
        )
        self.responses = Counter("g2r_responses_judged", "Responses judged", registry=self._registry)
        self.batch_rows = Histogram(
            "g2r_batch_responses", "Responses judged together", buckets=ROWS, registry=self._registry
        )
        self.busy = Counter("g2r_judge_busy_seconds", "Time that the judge has worked", registry=self._registry)
        self.refused = Counter("g2r_requests_refused", "Requests answered 429", registry=self._registry)
        self.cached = Counter("g2r_requests_cached", "Requests answered from the cache", registry=self._registry)
        self.restarts = Counter("g2r_judge_restarts", "Starts after the first", registry=self._registry)
        self.waiting = Gauge("g2r_requests_waiting", "Requests that wait for the judge", registry=self._registry)
        self.ready = Gauge("g2r_judge_ready", "1 while there are ranks that answer", registry=self._registry)

    def text(self) -> bytes:
        return generate_latest(self._registry)
