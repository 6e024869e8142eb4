"""Apache Kafka on this machine: a `Cluster` for tests, and one node for anybody (`make kafka`)."""

from __future__ import annotations

import base64
import secrets
import signal
import tempfile
import time
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import click

from tests.kafka import certificates, client, jars
from tests.kafka.process import Process, accepts, free_port, is_free
from tests.kafka.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

USER: Final = "alice"  # of the SASL listeners
PASSWORD: Final = "not-quite-secret"

_LOGIN: Final = "org.apache.kafka.common.security"
_HERE: Final = "127.0.0.1"
_JAVA: Final = ("java", "-Xms64m", "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
_START_SECONDS: Final = 90.0  # takes three
_STOP_SECONDS: Final = 20.0

_USE: Final = """\
Apache Kafka is at {servers}, until Ctrl-C.  Its data {kept}.
A topic comes into being when it is first written to, with {partitions} partitions.  As root:
  .venv/bin/python -m ebpfstream execve --to kafka://{servers}/exec"""


class Listener(StrEnum):
    """The ways into a node."""

    PLAIN = "PLAIN"
    PROXIED = "PROXIED"
    """Through `Cluster.proxies`."""
    SASL = "SASL"
    """PLAIN, SCRAM-SHA-256 and SCRAM-SHA-512, for USER with PASSWORD."""
    TLS = "TLS"
    """With certificates by `Cluster.authority`."""
    SASL_TLS = "SASL_TLS"
    MUTUAL_TLS = "MUTUAL_TLS"
    """Clients show a certificate too: `Cluster.certificate`."""


_PROTOCOLS: Final = {
    Listener.PLAIN: "PLAINTEXT",
    Listener.PROXIED: "PLAINTEXT",
    Listener.SASL: "SASL_PLAINTEXT",
    Listener.TLS: "SSL",
    Listener.SASL_TLS: "SASL_SSL",
    Listener.MUTUAL_TLS: "SSL",
}

# Failover within seconds, not half a minute; and no more threads, partitions and memory than tests use.
_PROPERTIES: Final = {
    "process.roles": "broker,controller",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": Listener.PLAIN,
    "auto.create.topics.enable": "false",
    "num.partitions": "3",
    "broker.heartbeat.interval.ms": "500",
    "broker.session.timeout.ms": "3000",
    "replica.lag.time.max.ms": "3000",
    "controller.quorum.election.timeout.ms": "1000",
    "controller.quorum.election.backoff.max.ms": "500",
    "controlled.shutdown.max.retries": "1",
    "group.initial.rebalance.delay.ms": "0",
    "num.network.threads": "1",
    "num.io.threads": "4",
    "background.threads": "2",
    "log.cleaner.dedupe.buffer.size": str(8 << 20),
    "offsets.topic.num.partitions": "1",
    "transaction.state.log.num.partitions": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    # Nobody is refused what no rule refuses (client.refuse); who does not log in may do everything.
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "allow.everyone.if.no.acl.found": "true",
    "super.users": "User:ANONYMOUS",
    "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
    "ssl.keystore.type": "PEM",
    "ssl.truststore.type": "PEM",
    f"listener.name.{Listener.MUTUAL_TLS.lower()}.ssl.client.auth": "required",
}


class BrokerError(Exception):
    """A node does not do what it was told to; the message ends with what it logged last."""


class Cluster:
    """One node of Kafka, or several, numbered from 1; each is broker and controller.

    Everything lies in `folder`, and what an earlier cluster left there is taken up; a node's log is in
    `folder/<number>/broker.log`.  Addresses are known from the beginning, and stay.  With three nodes,
    topics of replication 3 need 2 that are in step.  No topic comes into being by itself.

    `properties` are Kafka's own, over those chosen here; changes to the attribute count from the next
    start of a node.  Methods that take nodes mean all if none is named; they block, and may be called
    from any thread, from one at a time.  Whatever becomes of this process, nodes do not outlive it.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 1,
        *,
        listeners: Collection[Listener] = tuple(Listener),
        properties: Mapping[str, str] | None = None,
        host: str = _HERE,
        port: int = 0,
    ) -> None:
        """PLAIN listeners are at `host`; give a `port` to have the first node's there."""
        self.folder = folder.resolve()
        self.nodes = tuple(range(1, nodes + 1))
        self.properties = dict(properties or {})
        self._hosts = dict.fromkeys(listeners, _HERE) | {Listener.PLAIN: host}
        self.authority = self.folder / "authority.pem"
        """The certificate that certificates of nodes are verified with."""
        self.certificate = self.folder / "client.pem"
        """A client's certificate and its private key."""
        self._listeners = {node: {listener: free_port() for listener in listeners} for node in self.nodes}
        if port:
            self._listeners[1][Listener.PLAIN] = port
        self._controllers = {node: free_port() for node in self.nodes}
        self._advertised = {node: dict(ports) for node, ports in self._listeners.items()}
        self.proxies: dict[int, Proxy] = {}
        """By node, on the way to its PROXIED listener; they work while the cluster is open."""
        if Listener.PROXIED in listeners:
            for node in self.nodes:
                self.proxies[node] = proxy = Proxy(free_port(), self._listeners[node][Listener.PROXIED])
                self._advertised[node][Listener.PROXIED] = proxy.port
        self._processes: dict[int, Process] = {}
        self._exits = ExitStack()
        self._is_open = False

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def servers(self) -> str:
        """Addresses of all nodes, for clients without login or encryption."""
        return self.servers_at(Listener.PLAIN)

    def servers_at(self, listener: Listener) -> str:
        """Addresses of all nodes, at this listener of theirs."""
        return ",".join(self._server(node, listener) for node in self.nodes)

    def _server(self, node: int, listener: Listener) -> str:
        return f"{self._hosts[listener]}:{self._advertised[node][listener]}"

    def pid(self, node: int) -> int:
        """The process of a node that was started."""
        return self._processes[node].pid

    def start(self, *nodes: int) -> None:
        """Start nodes; when this returns, each of them knows that all of them are alive.

        Raises:
            JarsError: Java or Maven is missing.
            BrokerError: a node ended at once, or does not answer.
        """
        nodes = nodes or self.nodes
        if not self._is_open:
            self._open()
        for node in nodes:
            assert node not in self._processes, f"node {node} was started before"
            self._properties(node).parent.mkdir(exist_ok=True)
            self._properties(node).write_text(self._settings(node))
        self._format([node for node in nodes if not (self._data(node) / "meta.properties").exists()])
        for node in nodes:
            command = _java("kafka.Kafka", str(self._properties(node)))
            self._processes[node] = Process(command, self._log(node))
        for node in nodes:
            self._wait_for(node, set(nodes))

    def stop(self, *nodes: int) -> None:
        """Ask nodes to end: they hand over what they lead.  Those that do not within 20 s are killed."""
        processes = self._remove(nodes or tuple(self._processes))
        for process in processes:
            process.send(signal.SIGTERM)
        for process in processes:
            process.end(_STOP_SECONDS)

    def kill(self, *nodes: int) -> None:
        """End nodes by SIGKILL."""
        for process in self._remove(nodes or tuple(self._processes)):
            process.end()

    def restart(self, *nodes: int) -> None:
        """Start nodes again; those that are still running are killed first."""
        nodes = nodes or self.nodes
        for process in self._remove(set(nodes) & set(self._processes)):
            process.end()
        self.start(*nodes)

    def pause(self, *nodes: int) -> None:
        """Let nodes do nothing at all, by SIGSTOP; their connections stay open."""
        for node in nodes or tuple(self._processes):
            self._processes[node].send(signal.SIGSTOP)

    def resume(self, *nodes: int) -> None:
        """Let nodes go on after `pause`."""
        for node in nodes or tuple(self._processes):
            self._processes[node].send(signal.SIGCONT)

    def wait(self, node: int = 1) -> None:
        """Return when a node has ended by itself."""
        self._processes[node].wait()

    def log_tail(self, node: int = 1) -> str:
        """What a node logged last."""
        lines = self._log(node).read_text(errors="replace").splitlines()
        return "\n".join([f"The last lines of {self._log(node)}:", *lines[-25:]])

    def close(self) -> None:
        """Kill all nodes, and end the proxies."""
        self.kill()
        self._exits.close()
        self._is_open = False

    def _remove(self, nodes: Iterable[int]) -> list[Process]:
        return [self._processes.pop(node) for node in nodes]

    def _open(self) -> None:
        jars.get()
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.authority.exists():
            certificates.make(self.authority, self.folder / "server.pem", self.certificate, USER)
        with ExitStack() as exits:
            for proxy in self.proxies.values():
                exits.enter_context(proxy)
            self._exits = exits.pop_all()
        self._is_open = True

    def _settings(self, node: int) -> str:
        """The node's server.properties."""
        ports = self._listeners[node]
        protocols = [f"{listener}:{_PROTOCOLS[listener]}" for listener in ports]
        replication = min(3, len(self.nodes))
        in_step = min(2, replication)
        properties: dict[str, object] = {
            **_PROPERTIES,
            "node.id": node,
            "log.dirs": self._data(node),
            "controller.quorum.voters": ",".join(f"{n}@127.0.0.1:{p}" for n, p in self._controllers.items()),
            "listeners": f"{self._addresses(ports)},CONTROLLER://127.0.0.1:{self._controllers[node]}",
            "advertised.listeners": self._addresses(self._advertised[node]),
            "listener.security.protocol.map": ",".join([*protocols, "CONTROLLER:PLAINTEXT"]),
            "default.replication.factor": replication,
            "offsets.topic.replication.factor": replication,
            "min.insync.replicas": in_step,
            "ssl.keystore.location": self.folder / "server.pem",
            "ssl.truststore.location": self.authority,
        }
        for topic in ("transaction.state.log", "share.coordinator.state.topic"):
            properties[f"{topic}.replication.factor"] = replication
            properties[f"{topic}.min.isr"] = in_step
        for listener in {Listener.SASL, Listener.SASL_TLS} & set(ports):
            name = f"listener.name.{listener.lower()}"
            user = f'username="{USER}" password="{PASSWORD}" user_{USER}="{PASSWORD}"'
            properties[f"{name}.plain.sasl.jaas.config"] = f"{_LOGIN}.plain.PlainLoginModule required {user};"
            for mechanism in ("scram-sha-256", "scram-sha-512"):
                module = f"{_LOGIN}.scram.ScramLoginModule required;"
                properties[f"{name}.{mechanism}.sasl.jaas.config"] = module
        return "".join(f"{name}={value}\n" for name, value in {**properties, **self.properties}.items())

    def _format(self, nodes: Collection[int]) -> None:
        """Make the folders of nodes that have none, for one and the same cluster."""
        mechanisms = ("SCRAM-SHA-256", "SCRAM-SHA-512")
        users = [f"{mechanism}=[name={USER},password={PASSWORD}]" for mechanism in mechanisms]
        scram = [word for user in users for word in ("--add-scram", user)]
        formatting = []
        for node in nodes:
            settings = str(self._properties(node))
            tool = ["kafka.tools.StorageTool", "format", "-t", self._id(), "-c", settings, *scram]
            formatting.append((node, Process(_java(*tool), self._log(node))))
        for node, process in formatting:
            if code := process.wait():
                raise BrokerError(f"node {node} was not formatted: exit code {code}\n{self.log_tail(node)}")

    def _id(self) -> str:
        """The cluster's, of 22 characters in base64; the first of them must be no hyphen."""
        file = self.folder / "cluster_id"
        if not file.exists():
            file.write_text(base64.urlsafe_b64encode(b"\0" + secrets.token_bytes(15)).decode().rstrip("="))
        return file.read_text()

    def _wait_for(self, node: int, alive: set[int]) -> None:
        host, port = self._hosts[Listener.PLAIN], self._listeners[node][Listener.PLAIN]
        until = time.monotonic() + _START_SECONDS
        while not (accepts(port, host) and alive <= client.nodes(f"{host}:{port}")):
            what = "has ended at once" if self._processes[node].ended else ""
            if time.monotonic() > until:
                what = f"does not answer within {_START_SECONDS:.0f} s, or does not find nodes {alive}"
            if what:
                raise BrokerError(f"node {node} {what}\n{self.log_tail(node)}")
            time.sleep(0.1)

    def _addresses(self, ports: Mapping[Listener, int]) -> str:
        return ",".join(f"{listener}://{self._hosts[listener]}:{port}" for listener, port in ports.items())

    def _properties(self, node: int) -> Path:
        return self.folder / str(node) / "server.properties"

    def _data(self, node: int) -> Path:
        return self.folder / str(node) / "data"

    def _log(self, node: int) -> Path:
        return self.folder / str(node) / "broker.log"


def _java(*arguments: str) -> list[str]:
    logging = jars.ROOT / "tests/kafka/log4j2.properties"
    return [*_JAVA, f"-Dlog4j2.configurationFile={logging.as_uri()}", "-cp", f"{jars.get()}/*", *arguments]


@click.command()
@click.option(
    "--host", default=_HERE, show_default=True, help="The address of this machine where it listens."
)
@click.option("--port", default=9092, show_default=True, help="The port there.")
@click.option("--partitions", default=3, show_default=True, help="How many a new topic has.")
@click.option(
    "--data", type=click.Path(path_type=Path), help="Keep its data in this folder.  [default: nowhere]"
)
def main(host: str, port: int, partitions: int, data: Path | None) -> None:
    """Start one node of Apache Kafka, until Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not is_free(port, host):
        raise click.ClickException(
            f"port {port} is taken (`ss -ltnp` says by whom): end that, or name another --port"
            if is_free(0, host)
            else f"{host} is no address of this machine (`ip address` lists them): name another --host"
        )
    try:
        with tempfile.TemporaryDirectory(prefix="kafka-") as nowhere:
            _run(host, port, partitions, data or Path(nowhere), is_kept=data is not None)
    except (jars.JarsError, BrokerError) as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        click.echo("ended", err=True)


def _run(host: str, port: int, partitions: int, folder: Path, *, is_kept: bool) -> None:
    click.echo(f"Apache Kafka {jars.version()} is starting", err=True)
    properties = {"auto.create.topics.enable": "true", "num.partitions": str(partitions)}
    with Cluster(folder, listeners=[Listener.PLAIN], properties=properties, host=host, port=port) as cluster:
        kept = f"are kept in {folder}" if is_kept else "are gone then"
        click.echo(_USE.format(servers=cluster.servers, kept=kept, partitions=partitions))
        try:
            cluster.wait()
        except KeyboardInterrupt:
            cluster.stop()
            raise
        raise BrokerError(f"it has ended by itself\n{cluster.log_tail()}")


if __name__ == "__main__":
    main()
