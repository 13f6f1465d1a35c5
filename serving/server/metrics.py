"""Metrics for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.engine.observer import Observer
from serving.engine.requests import Backend, Reason

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
PATHS = (
    "/v1/images/generations",
    "/v1/images/reconstructions",
    "/v1/models",
    "/images",
    "/health",
    "/ready",
    "/metrics",
    "/openapi.json",
)
"""Values of the label ``path``; others are ``other``, so that clients cannot fill the memory with new ones."""


class Metrics(Observer):
    """Metrics of one server. It is the observer of its dispatcher, and counts the responses of its application."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._responses = Counter(
            "llamagen_responses", "HTTP responses; status 499: the client left.", ("path", "status"), registry=registry
        )
        self._response_seconds = Histogram(
            "llamagen_response_seconds", "Time to the end of a response.", ("path",), registry=registry, buckets=SECONDS
        )
        self._accepted = Counter("llamagen_images_accepted", "Images of accepted requests.", registry=registry)
        self._refused = Counter("llamagen_requests_refused", "Requests refused.", ("reason",), registry=registry)
        self._ended = Counter(
            "llamagen_requests_ended", "Accepted requests, by how they ended.", ("reason",), registry=registry
        )
        self._request_seconds = Histogram(
            "llamagen_request_seconds", "Time from acceptance to the end.", registry=registry, buckets=SECONDS
        )
        self._batches = Histogram("llamagen_batch_images", "Images in a batch.", registry=registry, buckets=BATCHES)
        self._images = Counter("llamagen_images", "Images finished.", registry=registry)
        self._queue_seconds = Histogram(
            "llamagen_queue_seconds", "Time of an image in the queue.", registry=registry, buckets=SECONDS
        )
        self._generation_seconds = Histogram(
            "llamagen_generation_seconds", "Time of an image in a worker.", registry=registry, buckets=SECONDS
        )
        self._started = Counter("llamagen_workers_started", "Workers that became ready.", registry=registry)
        self._died = Counter("llamagen_workers_died", "Workers that ended unexpectedly.", registry=registry)

    def watch(self, backend: Backend) -> None:
        """Add the load of a backend, which is read at each scrape."""
        for name, text, value in (
            ("waiting_images", "Images in the queue.", lambda: backend.load().waiting),
            ("running_images", "Images being generated.", lambda: backend.load().running),
            ("workers", "Workers that are alive.", lambda: backend.load().workers),
            ("ready", "1 if the server accepts requests.", lambda: float(backend.load().ready)),
        ):
            Gauge(f"llamagen_{name}", text, registry=self.registry).set_function(value)

    def response(self, path: str, status: int, seconds: float) -> None:
        """Count a response.

        Args:
            path: path of the request.
            status: HTTP status; 499 if the client left before the response began.
            seconds: time to the end of the response.
        """
        label = next((known for known in PATHS if path == known or path.startswith(f"{known}/")), "other")
        self._responses.labels(label, str(status)).inc()
        self._response_seconds.labels(label).observe(seconds)

    def text(self) -> bytes:
        """All metrics in the format of Prometheus."""
        return generate_latest(self.registry)

    def accepted(self, images: int) -> None:
        """See :class:`~serving.engine.observer.Observer`, as the following ones."""
        self._accepted.inc(images)

    def refused(self, reason: Reason) -> None:  # noqa: D102
        self._refused.labels(reason).inc()

    def ended(self, reason: Reason | None, seconds: float) -> None:  # noqa: D102
        self._ended.labels(reason or "finished").inc()
        self._request_seconds.observe(seconds)

    def batch(self, images: int) -> None:  # noqa: D102
        self._batches.observe(images)

    def image(self, queued: float, generated: float) -> None:  # noqa: D102
        self._images.inc()
        self._queue_seconds.observe(queued)
        self._generation_seconds.observe(generated)

    def worker_started(self, seconds: float) -> None:  # noqa: D102
        self._started.inc()

    def worker_died(self) -> None:  # noqa: D102
        self._died.inc()
