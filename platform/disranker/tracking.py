"""The numbers of a training run while it runs, for TensorBoard and for MLflow.

Numbers and settings alone go there, never the text of a query or a document.
"""

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disranker.recipe import Refused

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

URI = "MLFLOW_TRACKING_URI"
EXPERIMENT, TAG = "disranker", "disranker.run"  # in MLflow: where the runs are, and what holds a run's fixed name
SEND_EVERY_S = 10.0
AT_ONCE = 1000  # numbers, as many as MLflow takes in one request, so that a request is taken whole or not at all
PATIENCE = 20  # after a request that failed MLflow is left alone for so many times what the request took


class Tracker:
    """Numbers of a training run by step, for TensorBoard and, where `MLFLOW_TRACKING_URI` is set, MLflow."""

    def __init__(self, folder: str | Path, run: str, settings: Mapping[str, Any], done: int) -> None:
        """Goes on with the run of this name after step `done`, its last checkpoint; 0 is the start.

        `folder`, a local one, takes TensorBoard's files. Raises `Refused` where MLflow is asked for and not installed,
        MLflow's own error where its server does not answer.
        """
        from torch.utils.tensorboard import SummaryWriter

        uri = os.environ.get(URI)
        self._mlflow = _MLflow(uri, run, settings, done) if uri else None
        # Hides what a killed run logged after its checkpoint; at the start that is all of it, step 0 too.
        self._events = SummaryWriter(str(folder), purge_step=done + 1 if done else 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """What is not finite is left out: a curve has a gap there."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        for name, value in finite.items():
            self._events.add_scalar(name, value, step)
        if self._mlflow:
            self._mlflow.log(step, finite)

    def flush(self) -> None:
        """Before a checkpoint: what is not written by then is missing for ever if the run is killed after it."""
        self._events.flush()
        if self._mlflow:
            self._mlflow.send()

    def close(self) -> None:
        """The run has come to its end. One that died is not closed, so that MLflow does not call it finished."""
        self._events.close()
        if self._mlflow:
            self._mlflow.finish()


class _MLflow:
    """One run on an MLflow server, some seconds of numbers in a request."""

    def __init__(self, uri: str, run: str, settings: Mapping[str, Any], done: int) -> None:
        try:
            from mlflow import MlflowClient
        except ModuleNotFoundError as missing:
            raise Refused(f"{URI} is set, but {missing}; pip install mlflow-skinny, or unset it") from missing
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment()
        found = self._unended(experiment, run, done) or self._created(experiment, run, settings)
        self._run_id = found.info.run_id
        # MLflow shows a step twice that was logged twice, so the first value stays.
        self._last = {name: self._last_step(name) for name in found.data.metrics}
        self._waiting: list[Metric] = []
        self._next = time.monotonic() + SEND_EVERY_S
        self._alone_until = 0.0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._waiting += [
            Metric(name, value, now_ms, step) for name, value in values.items() if step > self._last.get(name, -1)
        ]
        if time.monotonic() >= self._next:
            self.send()

    def send(self) -> None:
        """What waits; where MLflow does not take it, it waits on: a server that is away does not end a training."""
        from mlflow.exceptions import MlflowException

        began = time.monotonic()
        if began < self._alone_until:
            return
        try:
            while self._waiting:
                self._client.log_batch(self._run_id, metrics=self._waiting[:AT_ONCE], synchronous=True)
                del self._waiting[:AT_ONCE]
        except MlflowException as error:
            logging.getLogger(__name__).warning("MLflow took no numbers and is asked again later: %s", error)
            self._alone_until = time.monotonic() + PATIENCE * (time.monotonic() - began)
        self._next = max(time.monotonic() + SEND_EVERY_S, self._alone_until)

    def finish(self) -> None:
        from mlflow.exceptions import MlflowException

        self._alone_until = 0.0
        self.send()
        try:
            self._client.set_terminated(self._run_id)
        except MlflowException as error:
            logging.getLogger(__name__).warning("MLflow was not told that the run has ended: %s", error)

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(EXPERIMENT)
        return found.experiment_id if found else self._client.create_experiment(EXPERIMENT)

    def _unended(self, experiment: str, run: str, done: int) -> "Run | None":
        """The latest run of this name; none where it has ended and this is a new start, trained again from step 0."""
        latest = self._client.search_runs(
            [experiment], f"tags.`{TAG}` = '{run}'", max_results=1, order_by=["attributes.start_time DESC"]
        )
        if not latest or (not done and latest[0].info.status != "RUNNING"):
            return None
        self._client.update_run(latest[0].info.run_id, status="RUNNING")
        return latest[0]

    def _created(self, experiment: str, run: str, settings: Mapping[str, Any]) -> "Run":
        from mlflow.entities import Param

        created = self._client.create_run(experiment, run_name=run, tags={TAG: run})
        params = [Param(name, str(value)) for name, value in _flat(settings)]
        self._client.log_batch(created.info.run_id, params=params, synchronous=True)
        return created

    def _last_step(self, name: str) -> int:
        return max((metric.step for metric in self._client.get_metric_history(self._run_id, name)), default=-1)


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str | float]]:
    """(dotted name, value) of every number, text, true and false; lists are left out."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        elif isinstance(value, str | int | float):
            yield above + name, value
