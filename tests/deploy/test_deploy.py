"""What is in deploy/ fits the server: its files parse, its paths and metrics exist, its time limits
are long enough."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from idlm.cli import app
from idlm.cli.serve import KEY_VARIABLE
from idlm.config import EngineConfig
from idlm.serving.app import router
from idlm.serving.client import EngineClient
from idlm.serving.config import Limits, ServeConfig, WorkerConfig
from idlm.serving.observe import Meters
from idlm.serving.server import GRACE_SECONDS
from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CONFIG = ServeConfig(WorkerConfig("nano"), "nano")
STOP_SECONDS = Limits().drain_seconds + GRACE_SECONDS
"""From SIGTERM to the end, at most."""
TYPES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def container() -> dict[str, Any]:
    (found,) = documents("kubernetes/deployment.yaml")[0]["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def instructions(name: str = "Dockerfile") -> list[tuple[str, str]]:
    """Name and rest of a Dockerfile's instructions."""
    text = (DEPLOY / name).read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace(
        "\\\n", " "
    )
    return [
        (name, rest)
        for name, _, rest in (line.partition(" ") for line in lines.splitlines() if line)
    ]


def unit() -> dict[str, str]:
    """The settings of the systemd unit that occur once."""
    lines = (DEPLOY / "idlm.service").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def composed() -> dict[str, Any]:
    """The services of compose.yaml."""
    (file,) = documents("compose.yaml")
    services = file["services"]
    assert isinstance(services, dict)
    return services


def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    """What `kubectl apply -k` applies, by kind and name."""
    files = documents("kubernetes/kustomization.yaml")[0]["resources"]
    found = [one for file in files for one in documents(f"kubernetes/{file}")]
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


def router_pod() -> dict[str, Any]:
    pod = manifests()["Deployment", "idlm-router"]["spec"]["template"]["spec"]
    assert isinstance(pod, dict)
    return pod


def routers() -> dict[str, list[str]]:
    """The arguments of the router, wherever it is started."""
    entry = json.loads(dict(instructions("router.Dockerfile"))["ENTRYPOINT"])
    given = {
        "compose": composed()["router"]["command"],
        "kubernetes": router_pod()["containers"][0]["args"],
    }
    return {name: [*entry, *arguments] for name, arguments in given.items()}


def value(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


@pytest.mark.parametrize("file", sorted(DEPLOY.rglob("*.y*ml")), ids=lambda file: file.name)
def test_yaml_parses(file: Path) -> None:
    assert all(isinstance(document, dict) for document in yaml.safe_load_all(file.read_text()))


def test_every_metric_of_the_dashboard_exists() -> None:
    client = EngineClient(CONFIG.worker, CONFIG.limits)
    exposed = re.findall(r"^# TYPE (\S+) (\S+)$", Meters(client).render().decode(), re.MULTILINE)
    known = {name + ending for name, kind in exposed for ending in TYPES[kind]}
    board = json.loads((DEPLOY / "grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    used = {name for query in queries for name in re.findall(r"\bidlm_\w+", query)}
    assert used <= known
    base = {name.removesuffix("_bucket") for name in used}
    assert {name for name, _ in exposed} - base == set(), "a metric that no panel shows"


def test_panels_do_not_overlap_and_queries_close_their_brackets() -> None:
    board = json.loads((DEPLOY / "grafana.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken and all(x < 24 for x, _ in cells)
        taken |= cells
        for target in panel["targets"]:
            assert all(
                target["expr"].count(a) == target["expr"].count(b) for a, b in ("()", "{}", "[]")
            )
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_probes_and_scrapes_ask_for_paths_that_exist() -> None:
    pod, known = container(), {getattr(route, "path", None) for route in router.routes}
    assert (
        pod["startupProbe"]["httpGet"]["path"]
        == pod["livenessProbe"]["httpGet"]["path"]
        == "/health"
    )
    assert pod["readinessProbe"]["exec"]["command"][-1] == "/ready"
    assert {
        "/health",
        "/ready",
        documents("prometheus.yml")[0]["scrape_configs"][0]["metrics_path"],
    } <= known


def test_everyone_waits_longer_than_the_drain() -> None:
    pod = documents("kubernetes/deployment.yaml")[0]["spec"]["template"]["spec"]
    before = float(container()["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pod["terminationGracePeriodSeconds"] > STOP_SECONDS + before
    assert int(unit()["TimeoutStopSec"]) > STOP_SECONDS


def test_nobody_is_root_and_the_key_is_a_secret() -> None:
    deployment = documents("kubernetes/deployment.yaml")[0]["spec"]["template"]["spec"]
    user = dict(instructions())["USER"]
    context = deployment["securityContext"]
    assert user == f"{context['runAsUser']}:{context['runAsGroup']}"
    assert context["runAsNonRoot"] is True and user != "0:0"
    assert container()["securityContext"]["readOnlyRootFilesystem"] is True
    (key,) = container()["env"]
    assert key["name"] == KEY_VARIABLE and "secretKeyRef" in key["valueFrom"]
    settings = unit()
    assert (settings["DynamicUser"], settings["NoNewPrivileges"], settings["ProtectSystem"]) == (
        "yes",
        "yes",
        "strict",
    )
    assert not any(KEY_VARIABLE in rest for name, rest in instructions() if name in ("ENV", "ARG"))


def test_there_are_as_many_threads_as_cores() -> None:
    arguments = container()["args"]
    assert (
        arguments[arguments.index("--threads") + 1] == container()["resources"]["requests"]["cpu"]
    )


def test_what_may_be_written_is_mounted() -> None:
    """The root file system is read-only; models and compiled kernels go to the cache."""
    written = dict(
        re.findall(
            r"(\w+)=(\S+)", next(rest for name, rest in instructions() if "XDG_CACHE_HOME" in rest)
        )
    )
    mounted = {mount["mountPath"] for mount in container()["volumeMounts"]}
    assert mounted == {"/cache", "/tmp"}
    assert all(
        written[name].startswith("/cache")
        for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR")
    )


def test_the_image_is_made_of_files_that_exist_and_that_docker_is_given() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    given = {line[1:] for line in ignored if line.startswith("!")}
    for name, rest in instructions():
        if name == "COPY" and "--from" not in rest:
            sources = rest.split()[:-1]
            assert all((ROOT / source).exists() for source in sources)
            assert set(sources) <= given
    assert given == {
        source
        for n, rest in instructions()
        if n == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize("who", ["image", "pod", "service", "replica-1", "replica-2"])
def test_the_commands_are_ones_that_serve_understands(who: str) -> None:
    """They get as far as the model, which does not exist; an unknown option ends earlier."""
    entry = json.loads(dict(instructions())["ENTRYPOINT"])
    start = unit()["ExecStart"].replace("${MODEL}", "nano").replace("$OPTIONS", "").split()
    command = {
        "image": [*entry, *json.loads(dict(instructions())["CMD"])],
        "pod": [*entry, *container()["args"]],
        "service": ["idlm", *start[1:]],
        **{name: [*entry, *one["command"]] for name, one in composed().items() if name != "router"},
    }[who]
    assert command[:2] == ["idlm", "serve"]
    result = CliRunner().invoke(
        app, [*command[1:], "--adapter", "x=no/where/at-all", "--host", "300.1.1.1"]
    )
    assert result.exit_code == 2 and "300.1.1.1" in result.stderr, result.stderr


def test_the_healthcheck_runs_a_file_of_the_image() -> None:
    check = json.loads(dict(instructions())["HEALTHCHECK"].partition("CMD ")[2])
    copied = {rest.split()[-1]: rest.split()[0] for name, rest in instructions() if name == "COPY"}
    assert (ROOT / copied[check[1]]).is_file() and check[1] == container()["readinessProbe"][
        "exec"
    ]["command"][1]
    assert check[2] == "/health"


def test_the_router_knows_both_replicas_and_has_the_key_that_they_have() -> None:
    services = composed()
    arguments = services["router"]["command"]
    urls = [one for one in arguments if one.startswith("http://")]
    replicas = sorted(services.keys() - {"router"})
    assert urls == [f"http://{name}:8000" for name in replicas] and len(replicas) == 2
    for name in replicas:
        one = services[name]
        assert value(arguments, "--api-key") == one["environment"][KEY_VARIABLE]
        assert "ports" not in one, "only the router is published"
        assert one["healthcheck"]["test"][1:] == ["python", "/opt/idlm/probe.py", "/ready"]
        assert float(one["stop_grace_period"].removesuffix("s")) > STOP_SECONDS
        assert one["read_only"] and {"cache:/cache"} == set(one["volumes"])


def test_the_router_finds_the_replicas_in_kubernetes() -> None:
    found, pod, arguments = manifests(), router_pod(), routers()["kubernetes"]
    replicas = found["Deployment", "idlm"]["spec"]
    assert replicas["replicas"] == 2
    label, _, name = value(arguments, "--selector").partition("=")
    assert replicas["template"]["metadata"]["labels"][label] == name
    port = container()["ports"][0]["containerPort"]
    assert value(arguments, "--service-discovery-port") == str(port)
    (router,) = pod["containers"]
    own = next(one for one in router["ports"] if one["name"] == "http")["containerPort"]
    assert value(arguments, "--port") == str(own)
    account = pod["serviceAccountName"]
    binding = found["RoleBinding", "idlm-router"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert ("ServiceAccount", account) in found
    (rule,) = found["Role", binding["roleRef"]["name"]]["rules"]
    assert rule["resources"] == ["pods"] and set(rule["verbs"]) == {"get", "list", "watch"}
    grace = float(value(arguments, "--shutdown-grace-period-secs"))
    assert pod["terminationGracePeriodSeconds"] > grace >= Limits().timeout
    key = next(one for one in router["env"] if one["name"] == KEY_VARIABLE)
    assert key in container()["env"] and value(arguments, "--api-key") == f"$({KEY_VARIABLE})"
    assert pod["securityContext"]["runAsNonRoot"] is True
    user = dict(instructions("router.Dockerfile"))["USER"]
    assert user == f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"


@pytest.mark.parametrize("where", ["compose", "kubernetes"])
def test_the_router_asks_for_paths_that_exist(where: str) -> None:
    known = {getattr(route, "path", None) for route in router.routes}
    assert value(routers()[where], "--health-check-endpoint") in known


SMG = shutil.which("smg") or shutil.which(ROOT / "build/integrations/router/bin/smg")


@pytest.mark.skipif(SMG is None, reason="no smg: make integrations")
@pytest.mark.parametrize("where", ["compose", "kubernetes"])
def test_the_router_knows_every_option(where: str) -> None:
    assert SMG is not None
    program, *arguments = routers()[where]
    assert program == "smg" and arguments[0] == "launch"
    # it refuses an unknown option, and a wrong value of a known one, before it shows its help
    command = [SMG, *arguments, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    for option in (one for one in arguments if one.startswith("--")):
        assert re.search(rf"{option}\b", done.stdout), option


def test_the_router_is_the_one_that_is_tested() -> None:
    pins = (ROOT / "benchmarks/clients/requirements/routers.txt").read_text().split()
    install = dict(instructions("router.Dockerfile"))["RUN"]
    assert next(pin for pin in pins if pin.startswith("smg==")) in install.split()


def test_ray_serves_what_the_integration_takes() -> None:
    (file,) = documents("ray.yaml")
    (application,) = file["applications"]
    module, _, name = application["import_path"].partition(":")
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
    (deployment,) = application["deployments"]
    assert f"def {name}(" in source and f"class {deployment['name']}:" in source
    for argument in application["args"]:
        assert f'"{argument}"' in re.findall(r"^OPTIONS = .*$", source, re.MULTILINE)[0]
    engine = EngineConfig(4, "planner", **application["args"]["engine"])
    assert deployment["ray_actor_options"]["num_cpus"] == engine.threads
    assert file["http_options"]["request_timeout_s"] >= Limits().timeout
    scaling = deployment["autoscaling_config"]
    assert scaling["target_ongoing_requests"] < engine.max_num_seqs
    assert engine.max_num_seqs < deployment["max_ongoing_requests"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
def test_systemd_knows_every_setting(tmp_path: Path) -> None:
    text = (DEPLOY / "idlm.service").read_text().replace("/opt/idlm/bin/idlm", sys.executable)
    (tmp_path / "idlm.service").write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "idlm.service")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)
    complaints = [line for line in result.stderr.splitlines() if "idlm.service" in line]
    assert not complaints
