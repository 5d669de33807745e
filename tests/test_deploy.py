"""What `deploy/` and the Dockerfile promise. Without Kubernetes and docker: files are read, nothing is started."""

import copy
import fnmatch
import functools
import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from referencing import Registry, Resource

from disranker import recipe as recipes
from serve import access, front

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy" / "kuberay"
FILES = sorted(FOLDER.glob("*.yaml"))
SCHEMAS = {
    name: json.loads((ROOT / "tests" / "schemas" / name).read_text()) for name in ("kuberay.json", "kubernetes.json")
}
DEFINED = {
    ("v1", "PersistentVolumeClaim"): "io.k8s.api.core.v1.PersistentVolumeClaim",
    ("v1", "Service"): "io.k8s.api.core.v1.Service",
    ("apps/v1", "StatefulSet"): "io.k8s.api.apps.v1.StatefulSet",
    ("networking.k8s.io/v1", "NetworkPolicy"): "io.k8s.api.networking.v1.NetworkPolicy",
    ("policy/v1", "PodDisruptionBudget"): "io.k8s.api.policy.v1.PodDisruptionBudget",
}
Json = dict[str, Any]


@functools.cache
def parsed(name: str) -> list[Json]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def documents(name: str) -> list[Json]:
    """Those of a manifest, to be changed by a test as it likes."""
    return copy.deepcopy(parsed(name))


def only(name: str, kind: str) -> Json:
    (found,) = [document for document in documents(name) if document["kind"] == kind]
    return found


KNOWN = Registry().with_resources((name, Resource.from_contents(schema)) for name, schema in SCHEMAS.items())


def faults(document: Json) -> list[str]:
    """What the schema of its kind says against it."""
    kind = document["kind"]
    if kind.startswith("Ray"):
        place = f"kuberay.json#/$defs/{kind}"
    else:
        place = f"kubernetes.json#/$defs/{DEFINED[document['apiVersion'], kind]}"
    validator = jsonschema.Draft202012Validator({"$ref": place}, registry=KNOWN)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def change(document: Json, place: str, how: Callable[[Any, Any], None]) -> None:
    """Calls `how` with what holds the last step of a place, and that step."""
    holder: Any = document
    *way, last = place.split(".")
    for step in way:
        holder = holder[int(step)] if step.isdigit() else holder[step]
    how(holder, last)


def every(node: Any, key: str) -> Iterator[Any]:
    """The values under a key, wherever it stands."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from every(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from every(value, key)


def pods() -> list[tuple[str, Json]]:
    """All pod templates, with the file of each."""
    keys = ("template", "submitterPodTemplate")
    return [
        (path.name, pod) for path in FILES for one in documents(path.name) for key in keys for pod in every(one, key)
    ]


def clusters() -> dict[str, Json]:
    return {
        "cluster.yaml": only("cluster.yaml", "RayCluster")["spec"],
        "job.yaml": only("job.yaml", "RayJob")["spec"]["rayClusterSpec"],
        "refresh.yaml": only("refresh.yaml", "RayCronJob")["spec"]["jobTemplate"]["rayClusterSpec"],
        "service.yaml": only("service.yaml", "RayService")["spec"]["rayClusterConfig"],
    }


def job_specs() -> dict[str, Json]:
    return {
        "job.yaml": only("job.yaml", "RayJob")["spec"],
        "refresh.yaml": only("refresh.yaml", "RayCronJob")["spec"]["jobTemplate"],
    }


def groups(cluster: Json) -> list[Json]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def serve_config() -> Json:
    return yaml.safe_load(only("service.yaml", "RayService")["spec"]["serveConfigV2"])


# Schemas


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_manifest_fits_its_schema(path):
    assert not [fault for document in documents(path.name) for fault in faults(document)]


HEAD = "spec.headGroupSpec"
MISSPELT = [
    ("cluster.yaml", "RayCluster", "spec.enableInTreeAutoscaling", "enableIntreeAutoscaling"),
    ("cluster.yaml", "RayCluster", "spec.autoscalerOptions.idleTimeoutSeconds", "idleTimeoutSecond"),
    ("cluster.yaml", "RayCluster", "spec.authOptions.mode", "Mode"),
    ("cluster.yaml", "RayCluster", f"{HEAD}.rayStartParams", "rayStartParam"),
    ("cluster.yaml", "RayCluster", f"{HEAD}.template.spec.containers.0.image", "Image"),
    ("cluster.yaml", "RayCluster", f"{HEAD}.template.spec.containers.0.resources.limits", "limit"),
    ("cluster.yaml", "RayCluster", f"{HEAD}.template.spec.securityContext.runAsNonRoot", "runAsNonroot"),
    ("cluster.yaml", "RayCluster", f"{HEAD}.template.spec.volumes.0.persistentVolumeClaim.claimName", "claim"),
    ("cluster.yaml", "RayCluster", "spec.workerGroupSpecs.1.minReplicas", "minReplica"),
    ("job.yaml", "RayJob", "spec.entrypointNumCpus", "entryPointNumCpus"),
    ("job.yaml", "RayJob", "spec.shutdownAfterJobFinishes", "shutdownAfterJobFinish"),
    ("job.yaml", "RayJob", "spec.submitterPodTemplate.spec.restartPolicy", "restart"),
    ("refresh.yaml", "RayCronJob", "spec.schedule", "cron"),
    ("refresh.yaml", "RayCronJob", "spec.jobTemplate.activeDeadlineSeconds", "activeDeadline"),
    ("service.yaml", "RayService", "spec.serveConfigV2", "serveConfig"),
    ("service.yaml", "RayService", "spec.rayClusterConfig", "rayClusterSpec"),
    ("service.yaml", "RayService", "spec.rayClusterConfig.gcsFaultToleranceOptions.redisAddress", "address"),
    ("service.yaml", "PodDisruptionBudget", "spec.minAvailable", "minimum"),
    ("redis.yaml", "StatefulSet", "spec.volumeClaimTemplates", "volumeClaims"),
    ("network.yaml", "NetworkPolicy", "spec.ingress", "ingres"),
    ("storage.yaml", "PersistentVolumeClaim", "spec.accessModes", "accessMode"),
]


@pytest.mark.parametrize(("name", "kind", "place", "misspelt"), MISSPELT)
def test_a_misspelt_key_is_a_fault(name, kind, place, misspelt):
    document = next(one for one in documents(name) if one["kind"] == kind)
    change(document, place, lambda holder, key: holder.update({misspelt: holder.pop(key)}))
    assert any(f"'{misspelt}'" in fault for fault in faults(document))


WRONG = [
    ("cluster.yaml", "RayCluster", "spec.authOptions.mode", "password"),
    ("cluster.yaml", "RayCluster", f"{HEAD}.rayStartParams.num-cpus", 0),
    ("cluster.yaml", "RayCluster", "spec.workerGroupSpecs.0.maxReplicas", "4"),
    ("cluster.yaml", "RayCluster", "apiVersion", "ray.io/v1alpha1"),
    ("job.yaml", "RayJob", "spec.submissionMode", "KubernetesMode"),
    ("service.yaml", "RayService", "spec.serveConfigV2", {"applications": []}),
    ("redis.yaml", "StatefulSet", "spec.replicas", "one"),
]


@pytest.mark.parametrize(("name", "kind", "place", "value"), WRONG)
def test_a_value_of_the_wrong_kind_is_a_fault(name, kind, place, value):
    document = next(one for one in documents(name) if one["kind"] == kind)
    change(document, place, lambda holder, key: holder.update({key: value}))
    assert len(faults(document)) == 1


def test_every_object_of_the_schemas_names_its_keys_or_the_type_of_all():
    """Else a misspelt key would pass there."""
    for schema in SCHEMAS.values():
        for part in objects(schema["$defs"]):
            assert part["additionalProperties"] is False


def objects(node: Any) -> Iterator[Json]:
    """All parts of a schema that list keys."""
    if isinstance(node, dict):
        if isinstance(node.get("properties"), dict) and "type" in node:
            yield node
        for value in node.values():
            yield from objects(value)


# Clusters


@pytest.mark.parametrize("name", clusters())
def test_the_head_does_no_work_and_workers_are_added_when_asked_for(name):
    cluster = clusters()[name]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] > 0
    assert all(group["minReplicas"] < group["maxReplicas"] for group in cluster["workerGroupSpecs"])


def test_ray_itself_reads_the_groups_as_meant():
    """With its own translation of a RayCluster for the autoscaler."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    manifest = only("cluster.yaml", "RayCluster")
    manifest["metadata"]["namespace"] = "default"
    types = _derive_autoscaling_config_from_ray_cr(manifest)["available_node_types"]
    found = {name: (kind["min_workers"], kind["max_workers"], kind["resources"]) for name, kind in types.items()}
    gib = 1024**3
    assert found == {
        "headgroup": (0, 0, {"CPU": 0, "memory": 8 * gib}),
        "cpu": (1, 4, {"CPU": 8, "memory": 32 * gib}),
        "gpu": (0, 4, {"CPU": 8, "GPU": 1, "memory": 48 * gib}),
    }


def test_the_job_and_the_refresh_run_on_a_cluster_like_the_one_that_stays():
    found = clusters()
    assert found["job.yaml"] == found["refresh.yaml"] == found["cluster.yaml"]


@pytest.mark.parametrize("name", clusters())
def test_whoever_talks_to_ray_needs_its_token(name):
    assert clusters()[name]["authOptions"]["mode"] == "token"


@pytest.mark.parametrize("name", clusters())
def test_what_spills_goes_to_a_volume_of_the_pod_and_runs_to_the_shared_claim(name):
    (claim,) = [document["metadata"]["name"] for document in documents("storage.yaml")]
    for group in groups(clusters()[name]):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted["/shared"]["persistentVolumeClaim"]["claimName"] == claim
        assert "emptyDir" in mounted[group["rayStartParams"]["object-spilling-directory"]]


# Jobs


@pytest.mark.parametrize("name", job_specs())
def test_an_entrypoint_runs_a_job_that_exists_with_a_recipe_that_all_nodes_see(name):
    words = shlex.split(job_specs()[name]["entrypoint"])
    assert words[:2] == ["python", "-m"]
    assert importlib.util.find_spec(words[2]) is not None
    path = words[words.index("--recipe") + 1]
    assert path.startswith("/shared/") or (ROOT / path.removeprefix("/app/")).is_file()
    for setting in [words[place + 1] for place, word in enumerate(words) if word == "--set"]:
        assert recipes.load(ROOT / "recipes" / "small.yaml", [setting]).root.startswith("/shared/")


@pytest.mark.parametrize("name", job_specs())
def test_a_job_starts_beside_a_head_without_cpus_and_takes_its_cluster_with_it(name):
    spec = job_specs()[name]
    assert 0 < spec["entrypointNumCpus"] <= 8
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"


def test_two_refreshes_never_run_at_once():
    """A RayCronJob cannot forbid it: each ends within the day, all its tries together."""
    spec = only("refresh.yaml", "RayCronJob")["spec"]
    assert re.fullmatch(r"\d+ \d+ \* \* \*", spec["schedule"])
    job = spec["jobTemplate"]
    assert job["activeDeadlineSeconds"] * (1 + job["backoffLimit"]) < 24 * 60 * 60


# The endpoint


def test_rays_own_schema_takes_the_configuration_of_the_endpoint():
    from ray.serve.schema import ServeDeploySchema

    assert ServeDeploySchema.model_validate(serve_config()).applications[0].name == "disranker"


def test_the_endpoint_is_configured_as_serve_config_yaml_but_for_what_a_cluster_asks_for():
    ours, theirs = serve_config(), yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    deployment = ours["applications"][0]["deployments"][0]
    assert deployment.pop("max_replicas_per_node") == 1
    assert deployment["autoscaling_config"].pop("min_replicas") == 2
    assert theirs["applications"][0]["deployments"][0]["autoscaling_config"].pop("min_replicas") == 1
    assert ours["http_options"].pop("host") == "0.0.0.0"
    assert theirs["http_options"].pop("host") == "127.0.0.1"
    assert deployment.pop("user_config") != theirs["applications"][0]["deployments"][0].pop("user_config")
    assert ours["applications"][0]["args"].pop("state").startswith("/shared/")
    assert ours == theirs


def test_the_endpoint_serves_what_the_job_publishes():
    from jobs.publish import BUNDLE
    from serve.settings import Served, Settings

    application = serve_config()["applications"][0]
    Settings.checked(application["args"])
    words = shlex.split(job_specs()["job.yaml"]["entrypoint"])
    root = words[-1].removeprefix("root=")
    assert Served.checked(application["deployments"][0]["user_config"]).bundle == f"{root}/{BUNDLE}"


def test_two_replicas_stand_on_two_nodes_and_one_stays_while_nodes_are_drained():
    (group,) = clusters()["service.yaml"]["workerGroupSpecs"]
    scaling = serve_config()["applications"][0]["deployments"][0]["autoscaling_config"]
    assert (group["minReplicas"], group["maxReplicas"]) == (scaling["min_replicas"], scaling["max_replicas"]) == (2, 4)
    (spread,) = group["template"]["spec"]["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    assert (spread["maxSkew"], spread["minDomains"], spread["whenUnsatisfiable"]) == (1, 2, "DoNotSchedule")
    budget = only("service.yaml", "PodDisruptionBudget")["spec"]
    assert budget["minAvailable"] == 1
    labels = group["template"]["metadata"]["labels"]
    assert labels.items() >= budget["selector"]["matchLabels"].items()
    assert labels.items() >= spread["labelSelector"]["matchLabels"].items()
    other = clusters()["service.yaml"]["headGroupSpec"]["template"]["metadata"]["labels"]
    assert not other.items() >= budget["selector"]["matchLabels"].items()


def test_requests_go_to_workers_that_can_answer():
    spec = only("service.yaml", "RayService")["spec"]
    assert spec["excludeHeadPodFromServeSvc"] is True
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    probe = group["template"]["spec"]["containers"][0]["readinessProbe"]
    assert probe["httpGet"] == {"path": "/readyz", "port": serve_config()["http_options"]["port"]}
    grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > serve_config()["applications"][0]["deployments"][0]["graceful_shutdown_timeout_s"]


def test_every_node_of_the_endpoint_knows_the_keys_and_what_stands_before_the_proxy():
    for group in groups(clusters()["service.yaml"]):
        given = {one["name"]: one for one in group["template"]["spec"]["containers"][0]["env"]}
        assert given[access.VARIABLE]["valueFrom"]["secretKeyRef"]["name"] == "disranker-keys"
        assert all(given[name]["value"] == value for name, value in front.VARIABLES.items())


def test_the_control_store_is_the_redis_of_redis_yaml_with_its_password():
    options = clusters()["service.yaml"]["gcsFaultToleranceOptions"]
    service = only("redis.yaml", "Service")
    assert options["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    redis = only("redis.yaml", "StatefulSet")["spec"]
    assert service["spec"]["selector"] == redis["template"]["metadata"]["labels"] == redis["selector"]["matchLabels"]
    container = redis["template"]["spec"]["containers"][0]
    (secret,) = [one for one in container["env"] if one["name"] == "REDISCLI_AUTH"]
    assert secret["valueFrom"] == options["redisPassword"]["valueFrom"]
    arguments = container["args"]
    assert arguments[arguments.index("--requirepass") + 1] == "$(REDISCLI_AUTH)"
    assert arguments[arguments.index("--appendonly") + 1] == "yes"
    (mount,) = container["volumeMounts"]
    assert (mount["mountPath"], mount["name"]) == ("/data", redis["volumeClaimTemplates"][0]["metadata"]["name"])


# What holds for every pod


@pytest.mark.parametrize(("name", "pod"), pods(), ids=lambda value: value if isinstance(value, str) else "")
def test_no_pod_runs_as_root_or_may_become_it(name, pod):
    user = pod["spec"]["securityContext"]
    assert user["runAsNonRoot"] is True and user["runAsUser"] >= 999 and user["runAsGroup"] >= 999
    for container in pod["spec"]["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize(("name", "pod"), pods(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_pod_is_promised_all_the_memory_that_it_may_take(name, pod):
    for container in pod["spec"]["containers"]:
        resources = container["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
        assert "cpu" in resources["requests"]


def test_there_are_as_many_pods_as_the_manifests_should_have():
    """Else the tests over all pods would hold for none."""
    found = [name for name, _ in pods()]
    assert {name: found.count(name) for name in set(found)} == {
        "cluster.yaml": 3,
        "job.yaml": 4,
        "refresh.yaml": 4,
        "service.yaml": 2,
        "redis.yaml": 1,
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_secrets_are_named_and_not_written(path):
    for document in documents(path.name):
        assert document["kind"] != "Secret"
        assert "namespace" not in document["metadata"]  # of whoever applies it
        for one in [one for env in every(document, "env") for one in env]:
            assert not re.search("pass|token|secret|key|auth", one["name"].lower()) or "value" not in one
        assert all(list(password) == ["valueFrom"] for password in every(document, "redisPassword"))


def test_a_network_policy_selects_pods_that_there_are():
    labels = [pod["metadata"]["labels"] for _, pod in pods()]
    for policy in documents("network.yaml"):
        wanted = policy["spec"]["podSelector"]["matchLabels"]
        assert any(one.items() >= wanted.items() for one in labels)
    ray = [pod["metadata"]["labels"] for name, pod in pods() if name != "redis.yaml"]
    assert all(one["app"] == "disranker" for one in ray)


# Versions


def constraint(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return version


def test_the_image_is_one_everywhere_and_only_a_gpu_asks_for_the_other_target():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name, pod in pods():
        for container in pod["spec"]["containers"]:
            gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            expected = "redis:7.4.0" if name == "redis.yaml" else f"disranker:{version}-{'gpu' if gpu else 'cpu'}"
            assert container["image"] == expected
    built = re.findall(r"docker build --target (\w+) -t (\S+) ", (ROOT / "Dockerfile").read_text())
    assert built == [(target, f"disranker:{version}-{target}") for target in ("cpu", "gpu")]


@pytest.mark.parametrize("name", clusters())
def test_the_manifests_name_the_ray_of_the_constraints(name):
    assert clusters()[name]["rayVersion"] == constraint("ray")


# Dockerfile


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, in order, with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in lines if line.strip()]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """For each stage what it is made from, and its instructions."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for name, rest in instructions():
        if name == "FROM":
            source, _, stage = rest.split(" ")
            found[stage] = (source, [])
        else:
            list(found.values())[-1][1].append((name, rest))
    return found


def whole(stage: str) -> list[tuple[str, str]]:
    """The instructions of a stage after those that it is made from."""
    source, own = stages()[stage]
    return (whole(source) if source in stages() else []) + own


def test_the_file_has_only_instructions_that_docker_knows_and_builds_each_stage_from_an_earlier_one():
    known = {"FROM", "RUN", "COPY", "ENV", "ARG", "WORKDIR", "USER", "HEALTHCHECK", "CMD"}
    assert {name for name, _ in instructions()} <= known
    assert instructions()[0][0] == "FROM"
    seen: list[str] = []
    for stage, (source, own) in stages().items():
        assert source in seen or source.startswith("python:")
        copied = [match[1] for name, rest in own if (match := re.match(r"--from=(\S+)", rest)) and name == "COPY"]
        assert set(copied) <= set(seen)
        seen.append(stage)


def test_the_python_is_pinned_and_the_one_of_the_project():
    (source,) = {source for source, _ in stages().values() if source not in stages()}
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", source)
    assert "PYTHON ?= python3.11" in (ROOT / "Makefile").read_text()


def test_torch_is_the_one_of_the_makefile_and_of_the_constraints():
    makefile = (ROOT / "Makefile").read_text()
    arguments = dict(rest.split("=", 1) for name, rest in whole("cpu-packages") if name == "ARG")
    for name in ("TORCH", "TORCH_INDEX"):
        assert f"\n{name} ?= {arguments[name]}\n" in makefile
    assert arguments["TORCH"] == f"torch=={constraint('torch')}+cpu"


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_packages_are_installed_at_the_versions_of_the_constraints(target):
    runs = [rest for name, rest in whole(f"{target}-packages") if name == "RUN"]
    (packages,) = [run for run in runs if f"'.[{target}]'" in run]
    taken = "constraints.txt" if target == "cpu" else "gpu-constraints.txt"
    assert packages.startswith(f"pip install -c {taken} ")
    left_out = [
        match[1] for run in runs if (match := re.search(rf"grep -v '\^([\w-]+)==' constraints.txt > {taken}$", run))
    ]
    assert left_out == ([] if target == "cpu" else ["apache-tvm-ffi"])
    assert all(constraint(package) for package in left_out)
    assert runs[-1] == "pip install --no-deps --force-reinstall ."  # the package itself, after its empty stand-in
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert target in extras


def test_the_cpu_image_loses_the_packages_that_make_setup_takes_away():
    (line,) = re.findall(r"pip uninstall -q -y (.+)", (ROOT / "Makefile").read_text())
    (run,) = [rest for name, rest in whole("cpu-packages") if name == "RUN" and "uninstall" in rest]
    assert run.endswith(f"pip uninstall -y {line}")


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_ends_as_a_user_that_is_not_root(target):
    steps = whole(target)
    assert steps[-1] == ("USER", "1000")
    assert any("useradd --uid 1000" in rest for name, rest in steps if name == "RUN")
    assert f"--from={target}-packages /usr/local /usr/local" in [rest for name, rest in steps if name == "COPY"]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_fetches_nothing_asks_for_a_token_and_finds_the_jobs(target):
    joined = " ".join(rest for name, rest in whole(target) if name == "ENV")
    given = dict(one.split("=", 1) for one in shlex.split(joined))
    expected = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "PYTHONPATH": "/app"}
    assert given.items() >= (expected | front.VARIABLES).items()
    assert ("WORKDIR", "/app") in whole(target)
    copied = [rest for name, rest in whole(target) if name == "COPY"]
    assert {"jobs jobs", "serve serve", "recipes recipes"} <= set(copied)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_tells_its_health_by_a_route_that_there_is(target):
    (check,) = [rest for name, rest in whole(target) if name == "HEALTHCHECK"]
    command = json.loads(check.split(" CMD ")[1] if " CMD " in check else check.split("CMD ")[1])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")
    assert "http://127.0.0.1:8000/healthz" in command[2]
    assert '"/healthz"' in (ROOT / "serve" / "api.py").read_text()
    (start,) = [rest for name, rest in whole(target) if name == "CMD"]
    assert json.loads(start) == ["serve", "run", "serve.app:build", "bundle=/bundle"]


def test_what_is_copied_is_in_the_tree_and_let_through():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignored[0] == "*"
    through = {line[1:] for line in ignored if line.startswith("!")}
    sources = {
        source
        for name, rest in instructions()
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split(" ")[:-1]
    }
    assert sources == through
    assert all((ROOT / source).exists() for source in sources)
    assert not [
        name for name in ("runs", ".git", ".venv", "keys.yaml") if any(fnmatch.fnmatch(name, one) for one in through)
    ]
