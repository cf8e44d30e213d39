"""The manifests: the cluster launcher's, Kubernetes', and what a spot node does when it gets its notice."""

from __future__ import annotations

import base64
import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

from pipeline.configuration.compose import compose
from tests.support import kuberay
from tests.support.clusters import Raylets
from tests.support.clusters import raylets as raylets
from tests.support.processes import PATIENCE_S

ROOT = Path(__file__).parent.parent


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


# -- ray up -----------------------------------------------------------------------------------------------------------


def test_cluster_yaml_is_what_rays_launcher_takes() -> None:
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(load("cluster.yaml"), schema)
    whole = prepare_config(load("cluster.yaml"))
    validate_config(whole)
    types = whole["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0  # no work there
    spot, fallback = types["gpu_spot"], types["gpu"]
    assert spot["priority"] > fallback.get("priority", 0)
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in fallback["node_config"]
    assert spot["node_config"]["InstanceType"] == fallback["node_config"]["InstanceType"]


def test_the_locked_versions_are_those_that_the_extras_ask_for() -> None:
    locked = dict(
        line.strip().lower().replace("_", "-").split("==")
        for line in (ROOT / "jobs/constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert locked["ray"] == version("ray")  # the cluster's and the one these tests ran with
    extras = ("llamacpp", "transformers", "vllm", "cluster", "azure", "bedrock", "s3", "serve", "traces", "vertex")
    wanted = [Requirement(line) for line in requires("eagleray") or []]
    # Without these a head has no dashboard, and so no Jobs API.
    wanted += [line for line in map(Requirement, requires("ray") or []) if "default" in str(line.marker)]
    for requirement in (line for line in wanted if line.name != "eagleray"):
        extras = (*extras, "default")
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            found = locked[requirement.name.lower().replace("_", "-")]
            assert requirement.specifier.contains(found), f"{requirement} is locked to {found}: make lock"
    commands = "\n".join([*load("cluster.yaml")["setup_commands"]])
    assert "-c jobs/constraints.txt" in commands


# -- KubeRay ----------------------------------------------------------------------------------------------------------

DOCS = (ROOT / "docs/cluster.md").read_text()
MANIFESTS = {"jobs/rayjob.yaml": kuberay.RAYJOB, "jobs/raycronjob.yaml": kuberay.RAYCRONJOB}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_what_kuberay_takes(name: str) -> None:
    manifest, schema = load(name), MANIFESTS[name]
    jsonschema.validate(manifest, schema)
    templates = kuberay.pods(manifest, schema)
    assert len(templates) == 2
    for template in templates:
        kuberay.check(template, "V1PodTemplateSpec")
    job = manifest["spec"].get("jobTemplate", manifest["spec"])
    assert job["rayClusterSpec"]["rayVersion"] == version("ray")
    words = shlex.split(job["entrypoint"])
    if words[0] == "sh":  # as the script does
        assert words[1] == "/home/ray/eagleray/jobs/nightly.sh" and "COPY --chown=ray . /home/ray/eagleray" in DOCS
        words = ["eagleray", "infer", *words[4:], f"dataset.path={words[2]}/data", f"output.path={words[3]}"]
    assert words[:2] == ["eagleray", "infer"]
    config = compose(words[2:])
    config.check()
    assert str(config.output.path).startswith("s3://bucket/")
    for template in templates:  # keys come from the secret that the docs make, and no variable of the manifest is a secret
        (container,) = template["spec"]["containers"]
        assert [source["secretRef"]["name"] for source in container["envFrom"]] == ["eagleray"]
        assert {variable["name"] for variable in container.get("env", ())} <= {"RAY_JOB_STOP_WAIT_TIME_S"}
    assert "kubectl create secret generic eagleray --from-env-file=keys.env" in (ROOT / name).read_text()
    assert "runtimeEnvYAML" not in job

    broken = copy.deepcopy(manifest)
    broken["spec"].setdefault("jobTemplate", {})["rayCluster"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)
    templates[0]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(AssertionError, match="resource is no field of V1Container"):
        kuberay.check(templates[0], "V1PodTemplateSpec")


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_kubectl_makes_the_secret_from_a_key_file(tmp_path: Path) -> None:
    (command,) = re.findall("^kubectl create secret .*", DOCS, re.MULTILINE)
    (tmp_path / "keys.env").write_text("# keys.env\nOPENAI_API_KEY=sk-a=b\n")
    words = [*shlex.split(command), "--dry-run=client", "-o", "json"]
    made = json.loads(subprocess.run(words, cwd=tmp_path, check=True, capture_output=True).stdout)
    kuberay.check({name: made[name] for name in ("apiVersion", "kind", "data")}, "V1Secret")
    assert {name: base64.b64decode(value) for name, value in made["data"].items()} == {"OPENAI_API_KEY": b"sk-a=b"}
    assert made["metadata"]["name"] == "eagleray"


def test_both_manifests_run_on_the_same_cluster() -> None:
    job, cron = load("jobs/rayjob.yaml")["spec"], load("jobs/raycronjob.yaml")["spec"]["jobTemplate"]
    assert {**job, "entrypoint": ""} == {**cron, "entrypoint": ""}


# -- spot -------------------------------------------------------------------------------------------------------------


class Metadata(BaseHTTPRequestHandler):
    """A cloud's metadata server; `server.notice` says whether the node is about to go."""

    def do_PUT(self) -> None:
        self.answer(200, "a-token") if self.server.cloud == "aws" else self.answer(404)  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        about, cloud = self.server.notice, self.server.cloud  # type: ignore[attr-defined]
        if cloud == "aws" and self.path == "/latest/meta-data/spot/instance-action":
            known = self.headers["X-aws-ec2-metadata-token"] == "a-token"
            self.answer((200 if about else 404) if known else 401, '{"action": "terminate"}')
        elif cloud == "gcp" and self.path == "/computeMetadata/v1/instance/preempted":
            self.answer(200 if self.headers["Metadata-Flavor"] == "Google" else 403, str(about).upper())
        else:
            self.answer(404)

    def answer(self, status: int, text: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_spot_notice_becomes_a_drain(cloud: str, metadata: ThreadingHTTPServer, raylets: Raylets) -> None:
    metadata.cloud, metadata.notice = cloud, False  # type: ignore[attr-defined]
    raylets.tell("add", "spot")
    node = next(id for id, name in raylets.ids.items() if name == "spot")
    url = f"http://127.0.0.1:{metadata.server_port}"
    address = ["--address", raylets.env["RAY_ADDRESS"], "--node-id", node]
    command = [sys.executable, str(ROOT / "jobs/spot_notice.py"), "--metadata", url, *address]
    watch = subprocess.Popen(command, env={**os.environ, "RAY_AUTH_MODE": "disabled"}, stderr=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        watch.wait(3)
    metadata.notice = True  # type: ignore[attr-defined]
    assert watch.wait(PATIENCE_S) == 0
    # A node without work ends at once, the others' rows get their time (test_losses.py).
    code = """if True:
        import json, ray
        from ray._private.state import state
        ray.init(logging_level="ERROR")
        idle = [node["NodeID"] for node in ray.nodes() if not node["Alive"]]
        print("FOUND", json.dumps([*state.get_draining_nodes(), *idle]))"""
    seen = subprocess.run([sys.executable, "-c", code], env=raylets.env, capture_output=True, text=True, timeout=PATIENCE_S)
    # Ray writes to the standard output, too, also after the script.
    (found,) = [line for line in seen.stdout.splitlines() if line.startswith("FOUND ")]
    assert json.loads(found.removeprefix("FOUND ")) == [node]
