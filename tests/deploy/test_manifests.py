"""Manifests are what Ray's and KubeRay's own schemas take, install all that the project has, and stay alike.

Against a live AWS account or Kubernetes nothing is tried here; tests/cluster/test_cluster_yaml.py runs cluster.yaml.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from serve_app.app import AppArgs
from serve_app.http_guard import proxy_middlewares
from serve_app.launch.tokens import VARIABLES
from serve_app.page.rights import Role

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"shadecast", "actors", "models", "serve_app", "train", "bench"}
BUILD_FILES = {"pyproject.toml", "README.md", "LICENSE", "constraints.txt"}
LAUNCHED = ("cluster.yaml", "deploy/aws.yaml")


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return loaded


@pytest.fixture
def service() -> dict[str, Any]:
    return load("deploy/kuberay-rayservice.yaml")


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(Path(__file__).with_name("rayservice-v1.7.0.json").read_text()))


def pods(service: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_takes_the_cluster_file(name):
    config = prepare_config(load(name))
    validate_config(config)
    with pytest.raises(jsonschema.ValidationError, match="worker_ip"):
        validate_config({**config, "worker_ip": "192.0.2.1"})


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_machine_gets_all_that_pip_builds_and_the_scripts_that_commands_name(name):
    config = load(name)
    mounts = config["file_mounts"]
    for remote, local in mounts.items():
        assert local.startswith("~") or (ROOT / local).exists(), f"{local} is mounted, and is not here"
        assert remote.endswith(local.removeprefix("~/"))
    assert set(mounts.values()) >= PACKAGES | BUILD_FILES
    commands = " ".join(c for k, v in config.items() if k.endswith("_commands") for c in v)
    for script in re.findall(r"~/shadecast/(\S+\.sh)", commands):
        assert (ROOT / script).exists(), f"{script} is called, and is not here"
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True, timeout=10)
    assert "shadecast up" in commands


def test_the_project_has_no_package_that_manifests_forget():
    include = re.search(r"packages\.find\]\ninclude = (\[.*\])", (ROOT / "pyproject.toml").read_text())
    assert include is not None
    assert {name.rstrip("*").partition(".")[0] for name in json.loads(include[1])} == PACKAGES
    copied = set(
        re.findall(r"\S+", " ".join(re.findall(r"COPY \S+ (.*) \S+", (ROOT / "deploy/Dockerfile").read_text())))
    )
    assert copied == PACKAGES | BUILD_FILES


def test_the_cluster_file_for_aws_installs_as_the_other_does():
    own, aws = (load(name) for name in LAUNCHED)
    for key in ("file_mounts", "rsync_exclude", "setup_commands"):
        assert own[key] == aws[key], key


def test_all_machines_share_one_authentication_mode_and_the_guard_of_the_proxies():
    settings = (ROOT / "deploy/host.sh").read_text()
    assert re.findall(r"^export RAY_AUTH_MODE=(\w+)$", settings, re.MULTILINE) == ["token"]
    assert f"{proxy_middlewares.__module__}:{proxy_middlewares.__name__}" in settings


def test_kuberay_takes_the_service(service, schema):
    assert [f"{e.json_path}: {e.message}" for e in schema.iter_errors(service)] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "serveConfigv2"), ""),
        (("spec", "rayClusterConfig", "gcsFaultToleranceOptions", "redisPasswort"), {}),
        (("spec", "rayClusterConfig", "authOptions", "mode"), "on"),
        (("spec", "rayClusterConfig", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "replicas"), "3"),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "img"), "x"),
    ],
)
def test_a_wrong_field_of_the_service_is_found(service, schema, path, value):
    broken: Any = copy.deepcopy(service)
    place = broken
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert list(schema.iter_errors(broken))


@pytest.mark.parametrize("source", ["deploy/kuberay-rayservice.yaml", "examples/serve_config.yaml"])
def test_serve_and_the_application_take_the_serve_configuration(source):
    loaded = load(source)
    config = yaml.safe_load(loaded["spec"]["serveConfigV2"]) if "spec" in loaded else loaded
    ServeDeploySchema.model_validate(config)
    for application in config["applications"]:
        assert application["import_path"] == "serve_app.app:build"
        AppArgs.model_validate(application["args"])


def test_the_services_replicas_fit_on_its_workers_one_on_each(service):
    arguments = AppArgs.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"])
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    cpus = float(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert arguments.max_replicas_per_node == 1
    assert arguments.replicas <= group["replicas"]
    assert arguments.num_cpus <= cpus


def test_the_services_head_survives_and_secrets_are_named_not_written(service):
    cluster = service["spec"]["rayClusterConfig"]
    assert set(cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]) == {"secretKeyRef"}
    assert cluster["authOptions"] == {"mode": "token", "secretName": "shadecast-tokens"}
    for pod in pods(service):
        for container in pod["containers"]:
            for variable in container["env"]:
                assert "TOKEN" not in variable["name"] or set(variable["valueFrom"]) == {"secretKeyRef"}


def test_no_pod_of_the_service_is_privileged_and_each_has_its_resources(service):
    for pod in pods(service):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert not {"hostNetwork", "hostPID", "hostIPC", "volumes"} & set(pod)
        for container in pod["containers"]:
            rights = container["securityContext"]
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"].keys() == container["resources"]["limits"].keys()


def test_image_and_service_name_the_ray_that_is_tested(service):
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == ray.__version__
    assert f"FROM rayproject/ray:{ray.__version__}-py311-cpu" in (ROOT / "deploy/Dockerfile").read_text()


def test_the_head_starts_a_control_plane_that_finds_its_token(service):
    (head,) = pods(service)[0]["containers"]
    command = head["lifecycle"]["postStart"]["exec"]["command"]
    assert "shadecast up" in command[-1]
    subprocess.run(["bash", "-n", "-c", command[-1]], check=True, timeout=10)
    assert VARIABLES[Role.OPERATE] in {variable["name"] for variable in head["env"]}
