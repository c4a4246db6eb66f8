"""MLflow. Where it is, and the experiment: MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME in the environment."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from megatron_bit.config import flat
from megatron_bit.training.trackers.tracker import About, Sent

_PARAMETERS = 100  # that one request may have
_LONGEST = 500  # letters of a parameter's value


class Mlflow:
    """One run there for all starts of a run here; its id is MLflow's own, and stands in RUN/trackers.json."""

    def __init__(self, about: About) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._sent = Metric, Sent(about.folder, "mlflow")
        self._client = MlflowClient()
        if self._sent.id is not None:
            self._id = self._sent.id
            self._client.update_run(self._id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "megatron_bit")
        there = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if there is None else there.experiment_id
        tags = {"megatron_bit.run": about.id, "megatron_bit.folder": str(about.folder.absolute())}
        self._id = self._client.create_run(experiment, run_name=about.folder.name, tags=tags).info.run_id
        self._sent.named(self._id)
        parameters = [Param(key, str(value)[:_LONGEST]) for key, value in flat(about.config)]
        for begin in range(0, len(parameters), _PARAMETERS):
            self._client.log_batch(self._id, params=parameters[begin : begin + _PARAMETERS])

    def scalars(self, group: str, step: int, tokens: int, values: Mapping[str, float]) -> None:
        if not self._sent.is_new(group, step):
            return
        now = time.time_ns() // 10**6
        pairs = {f"{group}/{key}": value for key, value in values.items()} | {"tokens": tokens}
        self._client.log_batch(self._id, metrics=[self._metric(k, float(v), now, step) for k, v in pairs.items()])

    def flush(self) -> None:
        self._sent.flush()

    def close(self, finished: bool) -> None:
        self._sent.flush()
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")
