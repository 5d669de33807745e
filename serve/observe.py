"""What Prometheus sees: Ray's own exporter has it, with the labels of deployment and replica. No label holds a text."""

from collections.abc import Sequence

from ray.serve import metrics

SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
SHARES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


class Observed:
    """The metrics of one replica."""

    def __init__(self) -> None:
        self._requests = metrics.Counter("disranker_requests", "Answers and refusals.", ("path", "status"))
        self._pairs = metrics.Counter("disranker_pairs", "Pairs that got a score.", ("arm",))
        self._tokens = metrics.Counter("disranker_tokens", "Tokens that the model read.", ("arm",))
        self._truncated = metrics.Counter("disranker_truncated_pairs", "Pairs longer than the model reads.")
        self._lost = metrics.Gauge("disranker_lost_records", "Records that could not be written.")
        self._waiting = metrics.Gauge("disranker_waiting", "What waits for the engine.", ("unit",))
        self._trial = metrics.Gauge("disranker_trial", "A candidate beside live: how it does.", ("what",))
        self._seconds = metrics.Histogram("disranker_seconds", "Time of a request by stage.", SECONDS, ("stage",))
        self._fill = metrics.Histogram("disranker_batch_fill", "Share of a batch that is tokens.", SHARES)

    def request(self, path: str, status: int, seconds: float) -> None:
        """One that was answered or refused; `path` is a route's own, never what somebody typed."""
        self._requests.inc(1, {"path": path, "status": str(status)})
        self._seconds.observe(seconds, {"stage": "request"})

    def scored(self, arm: str, tokens: int, truncated: Sequence[bool], encoding_s: float, engine_s: float) -> None:
        """Pairs that a student scored, and where their time went but for waiting."""
        self._pairs.inc(len(truncated), {"arm": arm})
        self._tokens.inc(tokens, {"arm": arm})
        if cut := sum(truncated):
            self._truncated.inc(cut)
        self._seconds.observe(encoding_s, {"stage": "encoding"})
        self._seconds.observe(engine_s, {"stage": "engine"})

    def waited(self, seconds: float) -> None:
        """In the queue, of a request that was scored."""
        self._seconds.observe(max(seconds, 0.0), {"stage": "waiting"})

    def batch(self, lengths: Sequence[int], tokens_per_batch: int) -> None:
        """One forward pass: how much of what it might hold it held."""
        self._fill.observe(sum(lengths) / max(tokens_per_batch, len(lengths) * max(lengths)))

    def state(self, waiting: tuple[int, int], lost: int, trial: dict[str, float | None] | None) -> None:
        """What is so now."""
        for unit, amount in zip(("requests", "tokens"), waiting, strict=True):
            self._waiting.set(amount, {"unit": unit})
        self._lost.set(lost)
        for what, amount in (trial or {}).items():
            if amount is not None:
                self._trial.set(amount, {"what": what})
