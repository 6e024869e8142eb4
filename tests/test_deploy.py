"""What runs the service, as it is given to others: it says the same as the code, and is valid where it is read."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from ebpfstream import cli, options
from ebpfstream.kernel.privileges import Capability
from ebpfstream.service import endpoint, instance
from ebpfstream.service.config import Config, ServiceConfig, parse
from ebpfstream.service.notify import Notifier

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
SYSTEMD = DEPLOY / "systemd"
UNIT = SYSTEMD / "ebpfstream@.service"
README = (DEPLOY / "README.md").read_text()
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
# Both without types; the first brings the second.
kubernetes: Any = pytest.importorskip("kubernetes_validate", reason="pip install --group deploy")
yaml: Any = importlib.import_module("yaml")

KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
VERSIONS = ("1.25", kubernetes.latest_version())

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze: apt-get install systemd"
)


def settings(path: Path) -> dict[str, list[str]]:
    """All values by their keys; "" takes back those before it (systemd.syntax(7))."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line.strip() and line[0] not in "#[":
            key, equals, value = line.partition("=")
            assert equals, line
            found[key] = [*found.get(key, []), value] if value else []
    return found


def seconds(value: str) -> float:
    return float(options.parse(value.replace("min", "m"), options.Seconds))


def manifests() -> list[dict[str, Any]]:
    return [each for path in KUBERNETES for each in yaml.safe_load_all(path.read_text())]


def manifest(kind: str) -> dict[str, Any]:
    (found,) = (each for each in manifests() if each["kind"] == kind)
    return found


def pod() -> dict[str, Any]:
    return dict(manifest("DaemonSet")["spec"]["template"]["spec"])


def config_map() -> dict[str, str]:
    return dict(manifest("ConfigMap")["data"])


def read(text: str) -> Config:
    """A configuration; its user is one that there is on every machine."""
    return parse(text.replace('user = "ebpfstream"', 'user = "nobody"'), Path("/etc/ebpfstream/execs.toml"))


def configurations() -> dict[str, str]:
    found = {
        f"README-{n}": text for n, text in enumerate(re.findall(r"```toml\n(.*?)```", README, re.DOTALL))
    }
    found |= {path.name: path.read_text() for path in DEPLOY.rglob("*.toml")}
    return found | config_map()


# --- systemd


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The unit in a folder, with a program that there is."""
    text = UNIT.read_text()
    program = settings(UNIT)["ExecStart"][0].split()[0]
    (tmp_path / "ebpfstream@.service").write_text(text.replace(program, "/bin/true"))
    return tmp_path


def analyze(*arguments: str, units: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments],
        env={"SYSTEMD_UNIT_PATH": f"{units}:", "PATH": "/usr/bin:/bin", "SYSTEMD_PAGER": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def complaints(output: str) -> list[str]:
    """Of other units on this machine we know nothing."""
    return [line for line in output.splitlines() if "ebpfstream" in line]


@needs_systemd
@pytest.mark.parametrize("drop_in", ["", "perf-events.conf", "newer-systemd.conf"])
def test_systemd_understands_the_unit(installed: Path, drop_in: str) -> None:
    version = int(re.findall(r"\d+", analyze("--version", units=installed).stdout)[0])
    if drop_in:
        folder = installed / "ebpfstream@.service.d"
        folder.mkdir()
        shutil.copy(SYSTEMD / drop_in, folder)
    found = complaints(analyze("verify", "--man=no", "ebpfstream@execs.service", units=installed).stdout)
    if drop_in == "newer-systemd.conf" and version < 254:
        assert found, "older ones do: then this belongs into the unit"
    else:
        assert found == []


@needs_systemd
def test_systemd_complains_of_what_it_does_not_know(installed: Path) -> None:
    unit = installed / "ebpfstream@.service"
    unit.write_text(unit.read_text().replace("ProtectClock=", "ProtectClocks="))
    (found,) = complaints(analyze("verify", "--man=no", "ebpfstream@execs.service", units=installed).stdout)
    assert "ProtectClocks" in found


@needs_systemd
def test_the_unit_is_exposed_to_little(installed: Path) -> None:
    unit = shutil.copy(installed / "ebpfstream@.service", installed / "ebpfstream@execs.service")
    done = analyze("security", "--offline=yes", "--threshold=20", "--no-pager", str(unit), units=installed)
    assert done.returncode == 0, done.stdout


def test_the_unit_says_what_the_code_does() -> None:
    unit = settings(UNIT)
    program, command, path = unit["ExecStart"][0].split()
    assert program == "/opt/ebpfstream/bin/ebpfstream"
    assert command in cli.main.commands
    assert path == "/etc/ebpfstream/%i.toml" == unit["AssertPathExists"][0]
    # HUP, which reloads; and what READY=1 and WATCHDOG=1 are for.
    assert unit["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    assert (unit["Type"], unit["NotifyAccess"]) == (["notify"], ["main"])
    watchdog = seconds(unit["WatchdogSec"][0])
    told = {"NOTIFY_SOCKET": "@", "WATCHDOG_USEC": f"{watchdog * 1e6:.0f}"}
    notifier = Notifier(told)
    assert notifier.watchdog_interval == watchdog / 2
    notifier.close()


def test_there_is_time_to_end() -> None:
    limit = seconds(settings(UNIT)["TimeoutStopSec"][0])
    deadlines = {name: read(text).service.deadline for name, text in configurations().items()}
    deadlines[""] = ServiceConfig.model_fields["deadline"].default
    # Detaching, the last fsync and the ledger come after it.
    assert max(deadlines.values()) + 5 < limit
    assert f"more than {limit - 5:g} s" in README
    assert f"SIGKILL after {limit:g} s" in README
    assert max(deadlines.values()) + 5 < pod()["terminationGracePeriodSeconds"]
    assert f"--stop-timeout {pod()['terminationGracePeriodSeconds']} " in DOCKERFILE


def test_the_folders_are_those_that_the_unit_makes() -> None:
    unit = settings(UNIT)
    (run,), (state,), (logs,), (cache,) = (
        unit[f"{each}Directory"] for each in ("Runtime", "State", "Logs", "Cache")
    )
    assert Path("/run", run) == instance.FOLDER == ServiceConfig.model_fields["lock_folder"].default
    assert unit["Environment"] == [f"EBPFSTREAM_CACHE=%C/{cache}"]
    for name in ("execs.toml", *(name for name in configurations() if name.startswith("README"))):
        for source in read(configurations()[name]).sources:
            for sink in source.sinks:
                file = Path(sink.address.removeprefix("file:"))
                assert sink.scheme != "file" or file.parent in (
                    Path("/var/log", logs),
                    Path("/var/lib", state),
                )
                assert Path(sink.options.get("spool", f"/var/lib/{state}/x")).parent == Path(
                    "/var/lib", state
                )


def test_rights_are_written_in_two_places_each_and_explained() -> None:
    known = {each.name for each in Capability}
    for path, expected in [
        (UNIT, {"CAP_BPF", "CAP_PERFMON"}),
        (SYSTEMD / "perf-events.conf", {"CAP_DAC_READ_SEARCH", "CAP_SYS_ADMIN"}),
    ]:
        found = settings(path)
        ambient, bounding = (
            " ".join(found[key]).split() for key in ("AmbientCapabilities", "CapabilityBoundingSet")
        )
        assert set(ambient) == set(bounding) == expected <= known
        assert all(f"| {each} |" in README for each in expected)


def test_the_user_is_the_one_that_is_made() -> None:
    (line,) = (
        each
        for each in (SYSTEMD / "ebpfstream.sysusers").read_text().splitlines()
        if not each.startswith("#")
    )
    assert shlex.split(line)[:2] == ["u", settings(UNIT)["User"][0]]
    assert settings(UNIT)["User"] == settings(UNIT)["Group"]


# --- configurations


@pytest.mark.parametrize("name", configurations())
def test_configurations_are_valid(name: str) -> None:
    assert isinstance(read(configurations()[name]), Config)


def test_what_is_named_is_there() -> None:
    named = set(re.findall(r"\bdeploy/[\w@./-]*\w", README + DOCKERFILE))
    named |= {f"deploy/{path}" for path in re.findall(r"\]\(([\w@./-]+)\)", README)}
    assert len(named) > 8
    assert [each for each in named if not (ROOT / each).exists()] == []


# --- the image


def instructions() -> list[tuple[str, str]]:
    """Each instruction and what follows it, comments left out and lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def test_the_image_is_made_of_what_there_is() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"pip install .*'\.\[(.*)\]'", DOCKERFILE)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert f"'.[{extras}]'" in README
    copied = [
        source
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert [each for each in copied if not (ROOT / each).exists()] == []
    let_through = {
        line.removeprefix("!")
        for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert let_through == set(copied)
    # What the package links to, and what its metadata is read from.
    links = {path.readlink().name for path in (ROOT / "ebpfstream").iterdir() if path.is_symlink()}
    assert {*links, "pyproject.toml", project["readme"], "LICENSE"} <= set(copied)


def test_the_image_names_no_registry() -> None:
    images = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    images += [each["image"] for each in (*pod()["containers"], *pod()["initContainers"])]
    assert [each for each in images if "/" in each] == []


class Answering(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Health)
        self.server.asked.append(self.path)
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Health(HTTPServer):
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.asked: list[str] = []


@pytest.fixture
def health() -> Iterator[Health]:
    with Health() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_image_asks_how_it_is(health: Health) -> None:
    (check,) = (rest for word, rest in instructions() if word == "HEALTHCHECK")
    _, *arguments = re.findall(r'"((?:[^"])*)"', check.partition("CMD ")[2])
    code = arguments[-1]
    _, port = endpoint.parse_listen(endpoint.DEFAULT_LISTEN)
    assert f":{port}/" in code
    assert ("EXPOSE", str(port)) in instructions()
    arguments[-1] = code.replace(f":{port}/", f":{health.server_port}/")

    def ask() -> int:
        return subprocess.run([sys.executable, *arguments], stderr=subprocess.DEVNULL).returncode

    assert ask() == 0
    health.status = 503
    assert ask() == 1
    assert health.asked == ["/healthz", "/healthz"]


# --- Kubernetes


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_understands_the_manifests(version: str) -> None:
    assert [each["kind"] for each in manifests()] == ["Namespace", "ConfigMap", "DaemonSet", "Service"]
    for each in manifests():
        kubernetes.validate(each, version, strict=True)


def test_kubernetes_complains_of_what_it_does_not_know() -> None:
    wrong = manifest("DaemonSet")
    wrong["spec"]["template"]["spec"]["containers"][0]["securityContext"]["capability"] = {}
    with pytest.raises(kubernetes.ValidationError, match="capability"):
        kubernetes.validate(wrong, VERSIONS[-1], strict=True)


def test_the_pod_is_what_the_image_and_its_configuration_want() -> None:
    (container,) = pod()["containers"]
    (path,) = (rest for word, rest in instructions() if word == "CMD")
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    (name,) = config_map()
    assert f'"{mounts["configuration"]}/{name}"' in path
    service = tomllib.loads(config_map()[name])["service"]
    assert endpoint.parse_listen(service["listen"]) == ("0.0.0.0", container["ports"][0]["containerPort"])
    assert f"useradd --system --no-create-home --home-dir /nonexistent {service['user']} " in DOCKERFILE
    assert set(mounts) == {each["name"] for each in pod()["volumes"]}
    assert str(instance.FOLDER) in mounts.values()
    (spool,) = (sink.options["spool"] for source in read(config_map()[name]).sources for sink in source.sinks)
    assert Path(spool).parent == Path(mounts["spool"])
    assert [
        container[f"{each}Probe"]["httpGet"]["path"] for each in ("startup", "liveness", "readiness")
    ] == [
        "/healthz",
        "/healthz",
        "/readyz",
    ]


def test_the_pod_has_the_rights_of_the_container() -> None:
    (container,) = pod()["containers"]
    rights = container["securityContext"]["capabilities"]
    (run,) = re.findall(r"docker run (.*?)\n#\n", DOCKERFILE, re.DOTALL)
    assert rights["drop"] == re.findall("--cap-drop (\\S+)", run) == ["ALL"]
    assert rights["add"] == re.findall("--cap-add (\\S+)", run)
    assert {f"CAP_{each}" for each in rights["add"]} <= {each.name for each in Capability}
    assert manifest("Namespace")["metadata"]["name"] == manifest("DaemonSet")["metadata"]["namespace"]
