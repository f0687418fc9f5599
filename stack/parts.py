"""The parts of the stack, a declaration each: how a part is started, when it is ready, how long it may take to end."""

import base64
import configparser
import importlib.util
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka import KafkaException

from kafka_io.clients import admin
from kafka_io.topics import create_topics
from lake.store import DEFAULT_REGION, aws_variables
from schemas.errors import ConfigError
from settings import OWN_STORE, own_credentials
from stack.ports import accepts, http_answer
from stack.processes import StartFailed
from stack.settings import ROOT, StackSettings

CONFIG = ROOT / "config"
ENVIRONMENT = Path(sys.prefix)
"""The virtual environment: its `bin` has the broker, its `jars/kafka` Kafka's class path."""
KAFKA_JARS = ENVIRONMENT / "jars" / "kafka"
KAFKA_HEAP = "-Xmx512m"
"""Enough for 300,000 records a second from one producer; about 350 MB resident."""
EVERYWHERE = "0.0.0.0"  # in a container, whose engine publishes on loopback
SPARK_HOME = Path(str(importlib.util.find_spec("pyspark").origin)).parent  # type: ignore[union-attr]
"""The wheel has no start scripts for a cluster, but what they start."""
WORKERS = 2
WORKER_MEMORY = "2g"
SUPERVISOR = "supervisor"
"""The process that starts dead parts again; no part itself."""
SUPERVISOR_GRACE_S = 15.0

Run = Callable[[list[str], str], None]
"""Runs a command to its end, its output in the part's log; the text says what failed, should it fail."""


@dataclass(frozen=True)
class Part:
    """A process of the stack.

    Attributes:
        name: of process, log and container.
        command: settings and the address of our own Spark master (empty: there is none) → program and arguments.
        start_timeout_s: some ten times what it takes to be ready on two idle cores: a busy machine is slow, not broken.
        stop_grace_s: what it may take to finish on SIGTERM, before it is killed.
        environment: variables of its own; arguments as of `command`.
        port_settings: names of the settings that are its ports, the one for clients first.
        option: of `make up`, by which it is started: cluster, critical or s3; empty: it always is.
        is_ready: whether it can be used; None where it writes its process id into run/<name>.ready then.
        missing: what keeps it from starting, a sentence each.
        prepare: what its home needs before each start; raises StartFailed.
        once_ready: what is done once it is ready; raises StartFailed.
    """

    name: str
    command: Callable[[StackSettings, str], list[str]]
    start_timeout_s: float
    stop_grace_s: float
    environment: Callable[[StackSettings, str], dict[str, str]] = lambda _settings, _own_master: {}
    port_settings: tuple[str, ...] = ()
    option: str = ""
    is_ready: Callable[[StackSettings], bool] | None = None
    missing: Callable[[StackSettings], list[str]] = lambda _: []
    prepare: Callable[[StackSettings, Run], None] = lambda _settings, _run: None
    once_ready: Callable[[StackSettings], None] = lambda _: None

    def ports(self, settings: StackSettings) -> dict[str, int]:
        """Ports that it listens on, by the variable that changes each; the one for clients first."""
        return {f"METERSTREAM_{name.upper()}": getattr(settings, name) for name in self.port_settings}

    def client_port(self, settings: StackSettings) -> int | None:
        """The port for clients, where it has one."""
        return next(iter(self.ports(settings).values()), None)


@dataclass(frozen=True)
class PartState:
    """What is known of one process: state is `running`, `starting`, `died` or `stopped`."""

    name: str
    state: str
    pid: int | None = None
    since: float | None = None
    port: int | None = None
    memory_bytes: int | None = None


def nats_server(settings: StackSettings) -> str:
    """The MQTT broker's program."""
    return str(settings.nats_server or ENVIRONMENT / "bin" / "nats-server")


def _nats_listeners(settings: StackSettings, _: str) -> dict[str, str]:
    return {
        "METERSTREAM_NATS_LISTEN": f"{settings.listen}:{settings.nats_port}",
        "METERSTREAM_NATS_MONITOR_LISTEN": f"{settings.listen}:{settings.nats_monitor_port}",
        "METERSTREAM_MQTT_LISTEN": f"{settings.listen}:{settings.mqtt_port}",
        "METERSTREAM_NATS_STORE": json.dumps(str(settings.folder / "nats")),
    }


def _nats_missing(settings: StackSettings) -> list[str]:
    server = nats_server(settings)
    return [] if shutil.which(server) else [f"no NATS server at {server}; METERSTREAM_NATS_SERVER names another"]


NATS = Part(
    "nats",
    command=lambda settings, _: [nats_server(settings), "-c", str(CONFIG / "nats" / "nats.conf")],
    environment=_nats_listeners,
    port_settings=("mqtt_port", "nats_port", "nats_monitor_port"),
    missing=_nats_missing,
    prepare=lambda settings, _: (settings.folder / "nats").mkdir(parents=True, exist_ok=True),
    is_ready=lambda settings: (
        accepts(settings.mqtt_port) and http_answer(settings.nats_monitor_port, "/healthz") is not None
    ),
    start_timeout_s=20.0,
    stop_grace_s=15.0,
)


def own_java() -> str:
    """The Java that set-up brought, where it brought one, else the machine's, as Spark chooses it."""
    own = ENVIRONMENT / "java" / "bin" / "java"
    if own.exists():
        return str(own)
    home = os.environ.get("JAVA_HOME")
    return str(Path(home) / "bin" / "java") if home else "java"


def _kafka_java(settings: StackSettings) -> list[str]:
    java = [own_java(), KAFKA_HEAP, f"-Djava.io.tmpdir={settings.folder / 'tmp'}", "-XX:-UsePerfData"]
    java += ["-XX:+ExitOnOutOfMemoryError", f"-Dlog4j2.configurationFile={CONFIG / 'kafka' / 'log4j2.properties'}"]
    return [*java, "-cp", str(KAFKA_JARS / "*")]


def _is_formatted(logs: Path) -> bool:
    return (logs / "meta.properties").exists()


def _kafka_missing(settings: StackSettings) -> list[str]:
    missing = []
    if not any(KAFKA_JARS.glob("kafka_*.jar")):
        missing.append(f"no Kafka jars in {KAFKA_JARS}: run make setup")
    logs = settings.folder / "kafka"
    if not _is_formatted(logs) and logs.exists() and any(logs.iterdir()):
        missing.append(f"{logs} has no meta.properties, so Kafka cannot read it: move it away")
    if shutil.which(own_java()) is None:
        missing.append("no Java found: run make setup")
    return missing


def _kafka_properties(settings: StackSettings, logs: Path) -> Path:
    """Writes the configuration with our ports and folders appended."""
    controller = f"127.0.0.1:{settings.kafka_controller_port}"
    listeners = {
        "PLAINTEXT": (f"{settings.listen}:{settings.kafka_port}", settings.kafka_bootstrap),
        "CONTROLLER": (controller, controller),
    }
    if settings.kafka_inside:
        port = settings.kafka_inside.rpartition(":")[2]
        listeners["INSIDE"] = (f"{settings.listen}:{port}", settings.kafka_inside)
    overrides = {
        "listeners": ",".join(f"{name}://{bound}" for name, (bound, _) in listeners.items()),
        "advertised.listeners": ",".join(f"{name}://{advertised}" for name, (_, advertised) in listeners.items()),
        "controller.quorum.bootstrap.servers": controller,
        "log.dirs": str(logs),
    }
    text = (CONFIG / "kafka" / "server.properties").read_text()
    properties = settings.folder / "run" / "kafka.properties"
    properties.write_text(text + "\n" + "".join(f"{key}={value}\n" for key, value in overrides.items()))
    return properties


def _format_kafka(settings: StackSettings, run: Run) -> None:
    """Formats Kafka's folder, the first time."""
    logs = settings.folder / "kafka"
    if _is_formatted(logs):
        return
    # Aside and renamed: a folder whose formatting was interrupted could never be used again.
    fresh = settings.folder / "kafka.formatting"
    shutil.rmtree(fresh, ignore_errors=True)
    cluster = base64.urlsafe_b64encode(b"\0" + secrets.token_bytes(15)).decode()
    tool = ["kafka.tools.StorageTool", "format", "--standalone", "-t", cluster.rstrip("=")]
    properties = _kafka_properties(settings, fresh)
    run([*_kafka_java(settings), *tool, "-c", str(properties)], "could not format its folder")
    if logs.exists():
        logs.rmdir()
    fresh.rename(logs)


def _kafka_command(settings: StackSettings, _: str) -> list[str]:
    return [*_kafka_java(settings), "kafka.Kafka", str(_kafka_properties(settings, settings.folder / "kafka"))]


def _kafka_answers(settings: StackSettings) -> bool:
    try:
        return accepts(settings.kafka_port) and bool(admin(settings.kafka_bootstrap).list_topics(timeout=2.0).brokers)
    except KafkaException:
        return False


def _make_topics(settings: StackSettings) -> None:
    try:
        create_topics(settings.kafka_bootstrap)
    except KafkaException as error:
        msg = f"could not create its topics: {error}"
        raise StartFailed(msg) from error


KAFKA = Part(
    "kafka",
    command=_kafka_command,
    port_settings=("kafka_port", "kafka_controller_port"),
    missing=_kafka_missing,
    prepare=_format_kafka,
    is_ready=_kafka_answers,
    once_ready=_make_topics,
    start_timeout_s=90.0,
    stop_grace_s=30.0,  # its clean flush
)

S3_SERVER = ENVIRONMENT / "bin" / "versitygw"


def _s3_folder(settings: StackSettings) -> Path:
    return settings.folder / "s3" / "buckets"


def s3_keys(settings: StackSettings) -> dict[str, str]:
    """Variables with the keys of the home's own S3 server: made the first time, kept as AWS's tools read them."""
    file = own_credentials(settings.folder)
    sections = configparser.RawConfigParser()
    sections.read(file)
    known = dict(sections["default"]) if sections.has_section("default") else {}
    said = {
        "aws_access_key_id": settings.s3_access_key or known.get("aws_access_key_id") or secrets.token_hex(10),
        "aws_secret_access_key": settings.s3_secret_key or known.get("aws_secret_access_key") or secrets.token_hex(20),
        "endpoint_url": f"http://127.0.0.1:{settings.s3_port}",
    }
    if said != known:
        sections["default"] = said
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".fresh")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as content:
            sections.write(content)
        fresh.rename(file)
    return {"AWS_ACCESS_KEY_ID": said["aws_access_key_id"], "AWS_SECRET_ACCESS_KEY": said["aws_secret_access_key"]}


def store_variables(settings: StackSettings, own_server: str = "") -> dict[str, str]:
    """Variables by which each process opens the store, wherever its own home is.

    Args:
        settings: of the stack.
        own_server: URL of its own S3 server, where it has one; by default that of this machine.
    """
    if settings.has_own_store:
        server = {
            "AWS_ENDPOINT_URL": own_server or f"http://127.0.0.1:{settings.s3_port}",
            "AWS_REGION": DEFAULT_REGION,
        }
        return {"METERSTREAM_STORE": settings.store, "AWS_SESSION_TOKEN": "", **server, **s3_keys(settings)}
    account = aws_variables(settings.store) if settings.store.startswith("s3://") else {}
    return {"METERSTREAM_STORE": settings.store, **account}


def _s3_prepared(settings: StackSettings, _: Run) -> None:
    """Makes the bucket."""
    (_s3_folder(settings) / OWN_STORE.removeprefix("s3://")).mkdir(parents=True, exist_ok=True)
    (settings.folder / "s3" / "attributes").mkdir(exist_ok=True)


def _s3_environment(settings: StackSettings, _: str) -> dict[str, str]:
    keys = s3_keys(settings)
    return {"ROOT_ACCESS_KEY": keys["AWS_ACCESS_KEY_ID"], "ROOT_SECRET_KEY": keys["AWS_SECRET_ACCESS_KEY"]}


def _s3_command(settings: StackSettings, _: str) -> list[str]:
    server = [str(S3_SERVER), "--port", f"{settings.listen}:{settings.s3_port}", "--health", "/health", "--quiet"]
    return [*server, "posix", "--sidecar", str(settings.folder / "s3" / "attributes"), str(_s3_folder(settings))]


S3 = Part(
    "s3",
    command=_s3_command,
    environment=_s3_environment,
    port_settings=("s3_port",),
    option="s3",
    missing=lambda _: [] if S3_SERVER.exists() else [f"no S3 server at {S3_SERVER}: run python3 tools/setup.py s3"],
    prepare=_s3_prepared,
    is_ready=lambda settings: http_answer(settings.s3_port, "/health") is not None,
    start_timeout_s=60.0,
    stop_grace_s=15.0,
)

INGEST = Part(
    "ingest",
    command=lambda *_: [sys.executable, "-m", "ingest", "run"],
    start_timeout_s=60.0,
    stop_grace_s=30.0,
)


def master_address(settings: StackSettings) -> str:
    """Where a Spark master of our own is."""
    return f"spark://{settings.listen}:{settings.spark_master_port}"


def _spark_host(settings: StackSettings) -> str:
    # not all addresses: they give each other what they are bound to
    return settings.listen if settings.listen != EVERYWHERE else socket.gethostname()


def _spark_class(settings: StackSettings, main: str) -> list[str]:
    return [str(SPARK_HOME / "bin" / "spark-class"), main, "--host", _spark_host(settings)]


def _spark_environment(settings: StackSettings, _: str) -> dict[str, str]:
    return {"SPARK_HOME": str(SPARK_HOME), "SPARK_LOCAL_IP": _spark_host(settings)}


def _master_command(settings: StackSettings, _: str) -> list[str]:
    ports = ["--port", f"{settings.spark_master_port}", "--webui-port", f"{settings.spark_master_ui_port}"]
    return [*_spark_class(settings, "org.apache.spark.deploy.master.Master"), *ports]


def _master_environment(settings: StackSettings, own_master: str) -> dict[str, str]:
    # Else a master that comes back knows no driver, and has the executors ended that still work for one.
    recovery = settings.folder / "tmp" / SPARK_MASTER.name
    kept = f"-Dspark.deploy.recoveryMode=FILESYSTEM -Dspark.deploy.recoveryDirectory={recovery}"
    options = f"{os.environ.get('SPARK_DAEMON_JAVA_OPTS', '')} {kept}".strip()
    return {**_spark_environment(settings, own_master), "SPARK_DAEMON_JAVA_OPTS": options}


def _has_workers(settings: StackSettings, count: int) -> bool:
    """Whether the master answers and has so many workers."""
    answer = http_answer(settings.spark_master_ui_port, "/json/")
    return answer is not None and int(json.loads(answer)["aliveworkers"]) >= count


SPARK_MASTER = Part(
    "spark-master",
    command=_master_command,
    environment=_master_environment,
    port_settings=("spark_master_port", "spark_master_ui_port"),
    option="cluster",
    is_ready=lambda settings: _has_workers(settings, 0),
    start_timeout_s=60.0,
    stop_grace_s=15.0,
)


def _worker_root(settings: StackSettings, name: str) -> Path:
    """A worker's home: as on a machine of its own it has nothing of the driver's but the store."""
    return settings.folder / "tmp" / name


def _spark_worker(number: int) -> Part:
    name = f"spark-worker-{number}"

    def command(settings: StackSettings, own_master: str) -> list[str]:
        master = settings.spark_master or own_master
        if not master:
            msg = f"{name} needs a master: METERSTREAM_SPARK_MASTER=spark://host:port, or CLUSTER=1 for one of our own"
            raise ConfigError(msg)
        worker = [*_spark_class(settings, "org.apache.spark.deploy.worker.Worker"), "--webui-port", "0"]
        worker += ["--cores", f"{max(1, (os.cpu_count() or 2) // WORKERS)}", "--memory", WORKER_MEMORY]
        return [*worker, "--work-dir", str(_worker_root(settings, name) / "work"), master]

    def environment(settings: StackSettings, own_master: str) -> dict[str, str]:
        root = _worker_root(settings, name)
        own = {"METERSTREAM_HOME": str(root), "SPARK_LOCAL_DIRS": str(root / "tmp"), "TMPDIR": str(root / "tmp")}
        return {**_spark_environment(settings, own_master), **own}

    return Part(
        name,
        command=command,
        environment=environment,
        prepare=lambda settings, _: (_worker_root(settings, name) / "tmp").mkdir(parents=True, exist_ok=True),
        option="cluster",
        is_ready=lambda settings: _has_workers(settings, number),
        start_timeout_s=60.0,
        stop_grace_s=15.0,
    )


def _streaming_environment(settings: StackSettings, own_master: str) -> dict[str, str]:
    master = {"METERSTREAM_SPARK_MASTER": own_master} if own_master else {}
    return {**master, "METERSTREAM_METRICS_PORT": str(settings.metrics_port)}


STREAMING = Part(
    "streaming",
    command=lambda *_: [sys.executable, "-m", "streaming_jobs"],
    environment=_streaming_environment,
    port_settings=("metrics_port",),
    start_timeout_s=180.0,
    stop_grace_s=60.0,  # a micro-batch
)

CRITICAL_EVENTS = Part(
    "critical_events",
    command=lambda *_: [sys.executable, "-m", "streaming_jobs.critical_events"],
    environment=lambda *_: {"METERSTREAM_SPARK_MASTER": ""},  # on this machine
    option="critical",  # it takes memory for good
    start_timeout_s=180.0,
    stop_grace_s=30.0,
)

PARTS = {
    part.name: part
    for part in (
        S3,
        NATS,
        KAFKA,
        INGEST,
        SPARK_MASTER,
        *(_spark_worker(number) for number in range(1, WORKERS + 1)),
        STREAMING,
        CRITICAL_EVENTS,
    )
}
"""By name, in the order of starting: each needs the ones before it."""
ALWAYS = tuple(name for name, part in PARTS.items() if not part.option)
CLUSTER = tuple(name for name, part in PARTS.items() if part.option == "cluster")
"""A Spark standalone cluster, which runs the same jobs: started before them where it is asked for."""


def asked_for(cluster: bool, critical: bool, s3: bool) -> tuple[str, ...]:
    """The names of a stack's parts, in the order of starting."""
    asked = {"cluster": cluster, "critical": critical, "s3": s3}
    return tuple(name for name, part in PARTS.items() if not part.option or asked[part.option])


def in_order(names: Iterable[str]) -> list[str]:
    """These names, each once, in the order of starting.

    Raises:
        ConfigError: a name is no part's.
    """
    wanted = set(names)
    unknown = wanted - set(PARTS)
    if unknown:
        message = f"no such process: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}"
        raise ConfigError(message)
    return [name for name in PARTS if name in wanted]
