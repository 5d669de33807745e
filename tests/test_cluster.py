"""cluster.yaml: what Ray accepts, what we promise, and that its commands start a cluster that works while nodes die."""

import copy
import json
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from jsonschema import ValidationError
from ray._common.utils import get_default_ray_temp_dir
from ray.autoscaler._private.util import prepare_config, validate_config

from bench import cluster as clusters
from bench import machines, one_host, serve
from disranker.store import Store

SHARED_RAY = Path(get_default_ray_temp_dir())


@pytest.fixture(scope="module")
def config():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_the_file_and_no_misspelt_key(config):
    validate_config(prepare_config(copy.deepcopy(config)))
    for wrong in ({"idle_timeout_minute": 5}, {"docker": config["docker"] | {"imag": "x"}}):
        with pytest.raises(ValidationError):
            validate_config(prepare_config(copy.deepcopy(config) | wrong))


def test_the_head_has_no_work_and_what_scores_is_on_spot_and_goes_when_idle(config):
    kinds = config["available_node_types"]
    assert kinds[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert kinds["cpu"]["min_workers"] >= 1 and kinds["cpu"]["resources"]["driver"] > 0
    assert kinds["gpu"]["min_workers"] == 0 and kinds["gpu"]["idle_timeout_s"] > 0
    assert kinds["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in kinds["cpu"]["node_config"]


def test_nodes_ask_for_the_token_spill_to_their_disk_and_show_the_dashboard_to_nobody(config):
    (head,), (worker,) = (
        [command for command in config[key] if "ray start" in command]
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
    )
    for command in (head, worker):
        assert command.startswith("RAY_AUTH_MODE=token ") and "--object-spilling-directory=/mnt/spill" in command
        assert "serve.front:middlewares" in command
    assert "--dashboard-host=127.0.0.1" in head and "--num-cpus=0" in head
    assert list(config["file_mounts"]) == ["~/.ray/auth_token"]


def test_the_file_on_one_host_differs_in_place_and_size_alone(config, tmp_path):
    here = clusters.Cluster(tmp_path).config()
    added = {"head_setup_commands", "worker_setup_commands", "cluster_synced_files"}
    own = {"provider", "available_node_types", "head_start_ray_commands", "worker_start_ray_commands"}
    own |= {"initialization_commands"}  # of instances: none of them here
    assert here.keys() == config.keys() - {"docker"} | added
    assert {key: here[key] for key in here.keys() - added - own} == {
        key: config[key] for key in config.keys() - own - {"docker"}
    }
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert [line.replace(str(tmp_path / "spill"), "/mnt/spill") for line in here[key]] == config[key]
    validate_config(prepare_config(here))


def test_the_commands_that_are_run_here_are_those_of_the_docs(tmp_path):
    cluster = clusters.Cluster(tmp_path)
    assert cluster.command("ray up")[1:] == ["up", "--yes", str(tmp_path / "cluster.yaml")]
    submit = cluster.command("ray job submit")
    assert submit[submit.index("--address") + 1] == cluster.address
    assert json.loads(submit[submit.index("--runtime-env-json") + 1]) == {"py_modules": ["platform/disranker"]}
    assert "--" in submit and len(clusters.documented()) >= 5


def test_commands_of_a_node_reach_its_own_ray_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "an allocator of Ray's own processes")
    shell = one_host.Shell("127.0.9.3", tmp_path, {"port": 4000, "dashboard": 5000})
    assert shell.here("ray stop") == shell.here("source ~/x; ray stop") == "true"
    started = shell.here("export RAY_HEAD_IP=127.0.9.1; ray start --address=$RAY_HEAD_IP:6379")
    assert "--node-ip-address=127.0.9.3" in started and started.endswith("--address=$RAY_HEAD_IP:4000")
    assert shell.environment()["HOME"] == shell.environment()[machines.MARK] == str(tmp_path)
    assert not {name for name in shell.environment() if name.startswith("LD_") or name == "RAY_AUTH_TOKEN"}


def test_a_node_has_the_folder_of_ray_for_itself(tmp_path):
    (home := tmp_path / "home").mkdir()
    one_host.Shell("127.0.9.3", home, {"port": 4000, "dashboard": 5000}).run(f"touch {SHARED_RAY}/{tmp_path.name}")
    assert (home / "ray" / tmp_path.name).exists() and not (SHARED_RAY / tmp_path.name).exists()


def test_rows_are_compared_exactly_but_for_their_fractions():
    row = {"key": "a", "docs": [{"id": "x", "score": 0.5}, {"id": "y", "score": None}], "count": 3}
    exact, fractions = clusters.parted(row)
    assert fractions == [0.5] and json.dumps(exact) == json.dumps(clusters.parted(row | {"docs": row["docs"]})[0])
    assert clusters.parted(row | {"count": 4})[0] != exact
    assert clusters.close([[1.0]], [[1.0004]]) and not clusters.close([[1.0]], [[1.01]])
    assert clusters.close([[float("nan")]], [[float("nan")]]) and not clusters.close([[float("nan")]], [[1.0]])


@pytest.mark.slow
def test_a_job_and_then_an_endpoint_on_nodes_that_ray_up_started_outlive_one_of_them(tiny_run, tiny, tmp_path):
    recipe, log = tmp_path / "recipe.yaml", tmp_path / "log"
    recipe.write_text(yaml.safe_dump(tiny | {"root": str(tmp_path / "run")}))
    with clusters.Cluster(tmp_path / "up", least=2).up() as cluster:
        assert cluster.asked("/api/jobs/") == [] and len(cluster.alive()) == 3
        assert clusters.killed(cluster, recipe, log, ["ingest"], "--until", "sample") == ["ingest"]
        cluster.until(lambda: len(cluster.alive()) == 3)  # the autoscaler has put another in its place
        (tmp_path / "asked").mkdir()
        asked = serve.Plan(tmp_path / "asked", tiny=True, engine="openvino", lists=40, fault_seconds=9)
        lost = clusters.outlived(cluster, asked, serve.made(asked).bundle)
        homes = cluster.homes()
    assert lost["ours"] == 0 and lost["requests"] > 20
    assert not any(machines.processes(home) for home in homes) and len(homes) == 5
    assert clusters.unlike(tiny_run, Store(str(tmp_path / "run")), clusters.EXACT) == []
