import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from disranker.recipe import Refused
from disranker.tracking import Tracker

RUN = "finetune-3f2a"
SETTINGS = {"seed": 3, "finetune": {"lr": 0.001, "loss": "ranknet", "general": ["a.txt"], "bands": {"tail": 0.5}}}


@pytest.fixture(autouse=True)
def _no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """MLflow's own store, in a folder; gives a client of it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    return MlflowClient(f"file://{tmp_path}/mlflow")


def track(folder, losses, done=0, close=True):
    """Losses by step, as one life of a run logs them."""
    tracker = Tracker(folder, RUN, SETTINGS, done)
    for step, loss in losses.items():
        tracker.log(step, {"loss": loss})
    tracker.close() if close else tracker.flush()
    return tracker


def drawn(folder, name="loss"):
    """What TensorBoard shows: (step, value) in order."""
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]


def runs(client):
    experiment = client.get_experiment_by_name("disranker")
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])


def history(client, run, name="loss"):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]


def test_tensorboard_shows_the_3_steps_that_were_logged(tmp_path):
    track(tmp_path, {0: 0.75, 1: 0.5, 2: 0.25})
    assert drawn(tmp_path) == [(0, 0.75), (1, 0.5), (2, 0.25)]


def test_a_restart_at_step_2_replaces_what_the_killed_run_logged_as_steps_3_and_4(tmp_path):
    killed = track(tmp_path, {0: 0.9, 1: 0.8, 2: 0.7, 3: 0.6, 4: 0.5}, close=False)
    track(tmp_path, {3: 0.06, 4: 0.05, 5: 0.04}, done=2)
    assert drawn(tmp_path) == [(0, 0.9), (1, 0.8), (2, 0.7), (3, 0.06), (4, 0.05), (5, 0.04)]
    killed.close()


def test_a_restart_before_the_first_checkpoint_replaces_step_0_too(tmp_path):
    track(tmp_path, {0: 0.9, 1: 0.8})
    track(tmp_path, {0: 0.5, 1: 0.4})
    assert drawn(tmp_path) == [(0, 0.5), (1, 0.4)]


def test_a_loss_that_is_not_finite_is_left_out_alone(tmp_path, server):
    tracker = Tracker(tmp_path, RUN, {}, 0)
    tracker.log(1, {"loss": float("nan"), "lr": 0.1})
    tracker.log(2, {"loss": 0.5, "lr": float("inf")})
    tracker.close()
    assert (drawn(tmp_path), drawn(tmp_path, "lr")) == ([(2, 0.5)], [(1, 0.1)])
    (run,) = runs(server)
    assert (history(server, run), history(server, run, "lr")) == ([(2, 0.5)], [(1, 0.1)])


def test_flush_brings_every_number_to_both_before_a_checkpoint(tmp_path, server):
    tracker = Tracker(tmp_path, RUN, SETTINGS, 0)
    for step in range(50):
        tracker.log(step, {"loss": step / 2})
    (run,) = runs(server)
    assert history(server, run) == []
    tracker.flush()
    assert drawn(tmp_path) == history(server, run) == [(step, step / 2) for step in range(50)]
    tracker.close()


def test_mlflow_gets_the_settings_with_dotted_names_and_no_lists(tmp_path, server):
    track(tmp_path, {1: 0.5})
    (run,) = runs(server)
    assert run.data.params == {
        "seed": "3",
        "finetune.lr": "0.001",
        "finetune.loss": "ranknet",
        "finetune.bands.tail": "0.5",
    }
    assert run.info.run_name == run.data.tags["disranker.run"] == RUN


def test_mlflow_takes_the_103_settings_of_a_long_recipe(tmp_path, server):
    Tracker(tmp_path, RUN, {f"x{i}": i for i in range(103)}, 0).close()
    assert len(runs(server)[0].data.params) == 103


def test_in_mlflow_a_restart_goes_on_in_the_same_run_and_no_step_stands_there_twice(tmp_path, server):
    killed = track(tmp_path, {1: 0.9, 2: 0.8, 3: 0.7}, close=False)
    assert runs(server)[0].info.status == "RUNNING"
    changed = Tracker(tmp_path, RUN, SETTINGS | {"seed": 4}, 2)
    for step in (3, 4):
        changed.log(step, {"loss": step / 100, "lr": step / 10})
    changed.close()
    (run,) = runs(server)
    assert history(server, run) == [(1, 0.9), (2, 0.8), (3, 0.7), (4, 0.04)]
    assert history(server, run, "lr") == [(3, 0.3), (4, 0.4)]
    assert (run.info.status, run.data.params["seed"]) == ("FINISHED", "3")
    killed.close()


def test_a_run_closed_and_then_killed_before_its_result_was_written_goes_on_as_running(tmp_path, server):
    track(tmp_path, {1: 0.9, 2: 0.8})
    tracker = track(tmp_path, {2: 0.5}, done=1, close=False)
    assert [run.info.status for run in runs(server)] == ["RUNNING"]
    tracker.close()


def test_training_the_same_again_from_the_start_is_a_run_of_its_own(tmp_path, server):
    track(tmp_path / "first", {1: 0.9, 2: 0.8})
    track(tmp_path / "second", {1: 0.7})
    killed = track(tmp_path / "third", {1: 0.6}, close=False)
    track(tmp_path / "third", {1: 0.5, 2: 0.4})
    assert [history(server, run) for run in runs(server)] == [[(1, 0.9), (2, 0.8)], [(1, 0.7)], [(1, 0.6), (2, 0.4)]]
    killed.close()


def test_two_stages_are_two_runs(tmp_path, server):
    track(tmp_path, {1: 0.9})
    Tracker(tmp_path, "distill-77", {}, 5).close()
    assert {run.info.run_name for run in runs(server)} == {RUN, "distill-77"}


def test_of_2203_numbers_none_arrives_twice_where_the_second_request_fails(tmp_path, server, monkeypatch):
    from mlflow.exceptions import MlflowException

    tracker = Tracker(tmp_path, RUN, {}, 0)
    for step in range(2203):
        tracker.log(step, {"loss": step / 2})
    store, sizes = type(server._tracking_client.store), []
    whole = store.log_batch

    def second_fails(self, run_id, metrics, params, tags):
        sizes.append(len(metrics))
        if len(sizes) == 2:
            raise MlflowException("no route to host")
        whole(self, run_id, metrics, params, tags)

    monkeypatch.setattr(store, "log_batch", second_fails)
    tracker.flush()
    tracker.close()
    assert sizes == [1000, 1000, 1000, 203]
    assert history(server, runs(server)[0]) == [(step, step / 2) for step in range(2203)]


def test_a_server_that_is_away_for_a_while_ends_no_training_and_misses_no_number(tmp_path, server, monkeypatch, caplog):
    from mlflow.exceptions import MlflowException

    asked = []

    def away(*_, **__):
        asked.append(1)
        raise MlflowException("no route to host")

    tracker = Tracker(tmp_path, RUN, SETTINGS, 0)
    with monkeypatch.context() as broken:
        broken.setattr(type(server), "log_batch", away)
        broken.setattr("disranker.tracking.PATIENCE", 1e9)
        tracker.log(1, {"loss": 0.5})
        tracker.flush()
        tracker.flush()
    assert len(asked) == 1 and "no route to host" in caplog.text
    tracker.log(2, {"loss": 0.25})
    tracker.close()
    assert history(server, runs(server)[0]) == [(1, 0.5), (2, 0.25)]


def test_numbers_are_sent_without_a_checkpoint_once_it_is_time(tmp_path, server, monkeypatch):
    monkeypatch.setattr("disranker.tracking.SEND_EVERY_S", 0.0)
    tracker = Tracker(tmp_path, RUN, {}, 0)
    monkeypatch.setattr("disranker.tracking.SEND_EVERY_S", 3600.0)
    tracker.log(1, {"loss": 0.5})
    tracker.log(2, {"loss": 0.25})
    assert history(server, runs(server)[0]) == [(1, 0.5)]
    tracker.close()


def test_mlflow_is_imported_only_where_its_address_is_set(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    track(tmp_path, {1: 0.5})
    assert drawn(tmp_path) == [(1, 0.5)]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    with pytest.raises(Refused, match=r"MLFLOW_TRACKING_URI is set.*pip install mlflow-skinny"):
        Tracker(tmp_path, RUN, {}, 0)
