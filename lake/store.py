"""The store: the one seam to file systems and object stores, where lake, state and reports lie, by one URL.

An object is written as a whole or not at all, under whatever name; `put_new` is the only conditional step, and of
several that try it at once one succeeds. Nothing is renamed, linked or locked, so a local folder and an object store
are the same to all that is built on it.
"""

import configparser
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import from_url
from pyarrow.fs import FileSystem, S3FileSystem, SubTreeFileSystem

from lake.hdfs import Hdfs
from schemas.errors import ConfigError, RetryLater
from settings import OWN_STORE, home, own_credentials, require_plain, store_url

SCHEMES = ("file", "s3", "gs", "az", "hdfs")
DEFAULT_REGION = "us-east-1"
AWS_FILES = (("AWS_CONFIG_FILE", "config"), ("AWS_SHARED_CREDENTIALS_FILE", "credentials"))
"""Variables that name AWS's files, and what they are called in `~/.aws`; the later one wins."""
AWS_KEYS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
AWS_NAMES = {**{name: name.upper() for name in AWS_KEYS}, "region": "AWS_REGION", "endpoint_url": "AWS_ENDPOINT_URL"}
"""What a profile says, and the variable that says the same."""
ARROW_NAMES = {
    "access_key": "ACCESS_KEY_ID",
    "secret_key": "SECRET_ACCESS_KEY",
    "session_token": "SESSION_TOKEN",
    "region": "REGION",
    "endpoint_override": "ENDPOINT_URL",
}
"""What Arrow's client calls what AWS's variables say."""
AWS_KEYS_AND_SERVER = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL")
AWS_VARIABLES = (*AWS_NAMES.values(), "AWS_ALLOW_HTTP")
IN_ONE_REQUEST = 64 * 2**20
"""Bytes that are put at once; larger ones in parts, which are two requests more."""
FAILURES = (BaseError, OSError, ValueError, RuntimeError)
"""What the clients raise; that of HDFS has no class of its own."""


class Store:
    """A store by its URL.

    Attributes:
        url: of its root, without a slash at the end.
    """

    def __init__(self, url: str) -> None:
        """Opens nothing that is not there: a local folder is made when something is written.

        Raises:
            ConfigError: the URL is of no kind that we know.
        """
        self.url = url.rstrip("/")
        scheme, _, rest = self.url.partition("://")
        if scheme not in SCHEMES or not rest:
            msg = f"METERSTREAM_STORE is {url}, expected {', '.join(f'{each}://…' for each in SCHEMES)}"
            raise ConfigError(msg)
        require_plain("METERSTREAM_STORE", url)
        self.is_local = scheme == "file"
        self._variables = aws_variables(self.url) if scheme == "s3" else {}
        self.use()
        try:
            if self.is_local:
                Path(rest).mkdir(parents=True, exist_ok=True)
            self._objects = Hdfs(self.url) if scheme == "hdfs" else _Objects(self.url)
        except FAILURES as error:
            msg = f"METERSTREAM_STORE is {url}, which cannot be opened: {error}"
            raise ConfigError(msg) from error

    def use(self) -> None:
        """Lets other libraries of this process find what opens the store: they look at AWS's variables."""
        for name in AWS_VARIABLES if self._variables else ():
            before, after = os.environ.get(name), self._variables.get(name)
            if before != after:
                _set_here[name] = _given(name), after
                if after is None:
                    del os.environ[name]  # empty, or of another account
                else:
                    os.environ[name] = after

    @property
    def filled(self) -> list[str]:
        """AWS's variables that this process was started without."""
        return sorted(
            name for name in AWS_KEYS_AND_SERVER if name in self._variables and _given(name) != self._variables[name]
        )

    def uri(self, path: str) -> str:
        """An object or folder as other libraries take it: a path where the store is a local folder, else a URL."""
        return f"{self.url}/{path}".removeprefix("file://")

    def arrow(self, folder: str) -> FileSystem | None:
        """A folder as Arrow's own client of S3 has it; None elsewhere: `deltalake` has one of its own for each store.

        That one calls Python from threads of others: with it a process may hang or abort where a file is gone.
        """
        if not self._variables:
            return None
        said = {name: self._variables.get(f"AWS_{variable}") for name, variable in ARROW_NAMES.items()}
        try:
            client = S3FileSystem(**{name: value for name, value in said.items() if value})
        except ValueError as error:
            msg = f"{self.url} cannot be opened: {error}"
            raise ConfigError(msg) from error
        return SubTreeFileSystem(f"{self.url.removeprefix('s3://')}/{folder}", client)

    def put(self, path: str, content: bytes | memoryview) -> None:
        """Writes an object; one of that name is replaced, in one step.

        Raises:
            RetryLater: the store does not take it.
        """
        with self._asked(path):
            self._objects.put(path, content)

    @contextmanager
    def writing(self, path: str) -> Iterator[BinaryIO]:
        """A file that is an object at its end, of a name that nobody uses: on a local folder half of it may be seen.

        Raises:
            RetryLater: the store does not take it.
        """
        if not self.is_local:
            content = io.BytesIO()
            yield content
            self.put(path, content.getbuffer())
            return
        place = Path(self.uri(path))
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("wb") as file:  # a copy less than by memory, of all rows
                yield file
        except BaseException as error:
            with suppress(OSError):
                place.unlink(missing_ok=True)  # of a full disk
            if isinstance(error, OSError):
                raise self._refused(path, error) from error
            raise

    def put_new(self, path: str, content: bytes) -> bool:
        """Writes an object where there is none of that name. Returns whether it did; of several at once one does.

        Raises:
            RetryLater: the store does not answer: nobody knows whether it did.
        """
        with self._asked(path):
            return self._objects.put_new(path, content)

    def get(self, path: str) -> bytes:
        """An object's bytes.

        Raises:
            FileNotFoundError: there is none.
            RetryLater: the store does not answer.
        """
        with self._asked(path):
            try:
                return self._objects.get(path)
            except FileNotFoundError:
                pass
        msg = f"{self.uri(path)} is not there"
        raise FileNotFoundError(msg)

    def has(self, path: str) -> bool:
        """Whether an object of that name is there.

        Raises:
            RetryLater: the store does not answer.
        """
        with self._asked(path):
            return self._objects.has(path)

    def paths(self, folder: str) -> list[str]:
        """All objects of a folder and of those in it, from the store's root, by name; none where there is no folder.

        Raises:
            RetryLater: the store does not answer.
        """
        with self._asked(folder):
            try:
                return sorted(self._objects.paths(folder))
            except FileNotFoundError:
                return []

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder.

        Raises:
            RetryLater: the store does not answer.
        """
        with self._asked(folder):
            try:
                return sorted(path.rstrip("/").rpartition("/")[2] for path in self._objects.folders(folder))
            except FileNotFoundError:
                return []

    def delete(self, paths: Iterable[str]) -> None:
        """Removes objects; those that are not there already are no error.

        Raises:
            RetryLater: the store does not answer.
        """
        gone = list(paths)
        with self._asked(f"the end of {gone}"[:200]):
            self._objects.delete(gone)

    @contextmanager
    def _asked(self, path: str) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            raise self._refused(path, error) from error

    def _refused(self, path: str, error: Exception) -> RetryLater:
        why = str(error).partition("\n\tat ")[0].partition(r"\n\tat ")[0]  # without the name node's stack
        why = " ".join(why.split())[:500]
        hint = " Its server is the stack's own: .venv/bin/stack up s3 starts it." if self.url == OWN_STORE else ""
        return RetryLater(f"the store {self.url} did not take or give {path}: {why}{hint}")


class _Objects:
    """Objects of a folder or an object store, by `obstore`; see `Store`, which has the same calls."""

    def __init__(self, url: str) -> None:
        self._store, self._is_local = from_url(url), url.startswith("file://")

    def put(self, path: str, content: bytes | memoryview) -> None:
        obstore.put(self._store, path, content, chunk_size=IN_ONE_REQUEST)

    def put_new(self, path: str, content: bytes) -> bool:
        try:
            obstore.put(self._store, path, content, mode="create")
        except AlreadyExistsError:
            return False
        return True

    def get(self, path: str) -> bytes:
        return obstore.get(self._store, path).bytes().to_bytes()

    def has(self, path: str) -> bool:
        try:
            obstore.head(self._store, path)
        except FileNotFoundError:
            return False
        return True

    def paths(self, folder: str) -> list[str]:
        return [entry["path"] for chunk in obstore.list(self._store, f"{folder}/") for entry in chunk]

    def folders(self, folder: str) -> list[str]:
        return list(obstore.list_with_delimiter(self._store, f"{folder}/")["common_prefixes"])

    def delete(self, paths: list[str]) -> None:
        for those in paths if self._is_local else [paths] if paths else []:  # an object store takes many in a request
            with suppress(FileNotFoundError):
                obstore.delete(self._store, those)


def aws_variables(url: str) -> dict[str, str]:
    """What AWS's variables have to say of a store: of the libraries that open it not all read AWS's files.

    What a variable says already stays; keys are then not looked for. What the profile `AWS_PROFILE` says is taken else;
    of the S3 server of a stack's own, what the home has kept.

    Args:
        url: of the store.
    """
    own = own_credentials(home())
    is_own = url == OWN_STORE and own.exists()
    files = [own] if is_own else [os.environ.get(name) or Path.home() / ".aws" / file for name, file in AWS_FILES]
    profile = "default" if is_own else (os.environ.get("AWS_PROFILE") or "default")
    sections = configparser.RawConfigParser()
    try:
        sections.read(files)
    except configparser.Error as error:
        msg = f"keys of {url} cannot be read: {' '.join(str(error).split())}"
        raise ConfigError(msg) from error
    said: dict[str, str] = {}
    for section in (f"profile {profile}", profile):
        said |= dict(sections[section]) if sections.has_section(section) else {}
    given = {name: value for name in AWS_NAMES.values() if not is_own and (value := _given(name))}
    if "AWS_ACCESS_KEY_ID" in given:
        said = {name: value for name, value in said.items() if name not in AWS_KEYS}
    found = {AWS_NAMES[name]: value for name, value in said.items() if name in AWS_NAMES} | given
    region = DEFAULT_REGION if is_own else os.environ.get("AWS_DEFAULT_REGION")
    found.setdefault("AWS_REGION", region or DEFAULT_REGION)
    if found.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        found["AWS_ALLOW_HTTP"] = "true"
    return found


_set_here: dict[str, tuple[str | None, str | None]] = {}
"""AWS's variables that this process has changed, for the S3 store that was used last: before, and after that."""


def _given(name: str) -> str | None:
    """What a variable says that was not set here."""
    now = os.environ.get(name)
    before, after = _set_here.get(name, (now, now))
    return before if now == after else now


@lru_cache(maxsize=8)
def _opened(url: str, _: Path | None) -> Store:
    return Store(url)


_used: ContextVar[str | None] = ContextVar("store", default=None)


def store() -> Store:
    """The store of this home: `METERSTREAM_STORE`, else the home itself; opened once a process.

    Raises:
        ConfigError: see `Store`.
    """
    return _found(_used.get() or store_url())


def _found(url: str) -> Store:
    found = _opened(url, home() if url == OWN_STORE else None)  # a server of each home's own
    found.use()
    return found


@contextmanager
def used(url: str) -> Iterator[None]:
    """While it holds, `store` is the one of this URL: for a task, whose process knows nothing of the driver's home."""
    token = _used.set(url)
    try:
        _found(url)  # what reads without it finds AWS's variables
        yield
    finally:
        _used.reset(token)
