"""Reading URLs: where a shard lies, opening it at an offset, and fetching it whole over connections that break.

http(s)://...      urllib; a broken download goes on where it stopped, by a Range request
s3://BUCKET/KEY    boto3, with its usual credentials and AWS_ENDPOINT_URL; goes on by a Range request
pipe:COMMAND       what the command prints, through `webdataset.gopen`; begins anew
gs://, hf://, ...  whatever else `webdataset.gopen` opens; begins anew
"""

import hashlib
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from http.client import HTTPException
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from depthkit.config import ConfigError
from depthkit.data.quarantine import SampleError

TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""
MAX_FAILURES = 6
"""Tries in a row that fail, without a mebibyte in between, before a URL counts as unreachable."""
MAX_WRONG = 2
"""Whole downloads with wrong bytes before the URL counts as damaged."""
FIRST_DELAY = 1.0
"""Seconds before the second try; doubled for each further one, then drawn from half of it to all of it."""
CHUNK = 1 << 20

REMOTE = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")
MANIFEST_NAME = re.compile(r"[^/\s'\"=:]+\.json\b")
PLAIN_PATH = re.compile(r"[\w./+=,@%-]+")

T = TypeVar("T")

_jitter = random.SystemRandom()  # forked workers would share the state of an ordinary generator


class Source(NamedTuple):
    """An open URL: `stream.read(n)` gives its bytes from `start` on, to `end` where its server says how many it has."""

    stream: Any
    start: int
    end: int | None = None


class CacheError(OSError):
    """The cache folder cannot take a shard; the message names path, needed and free bytes."""


class RangeRefusedError(OSError):
    """The file behind the URL ends before the offset."""


def is_remote(location: Path | str) -> bool:
    """Whether a manifest or shard is given by URL. A `Path` never is: it would make `http:/` of `http://`."""
    return isinstance(location, str) and REMOTE.match(location) is not None


def root_of(manifest: Path | str) -> Path | str:
    """What `locate` needs to know of a manifest: its folder, or its URL."""
    return manifest if isinstance(manifest, str) and is_remote(manifest) else Path(manifest).parent


def locate(root: Path | str, path: str) -> Path | str:
    """Where the shard `path` of a manifest lies; an absolute URL stands for itself.

    `root` is the manifest's folder or URL. In a URL the path takes the place of the last part, in a `pipe:` command
    that of the manifest's name, its only word in `.json`. ConfigError where that is not possible, and for a command
    in a manifest that itself was downloaded.
    """
    if is_remote(path):
        if path.startswith("pipe:") and isinstance(root, str) and not root.startswith("pipe:"):
            raise ConfigError(f"{shown(root)}: shard {path!r}: a downloaded manifest may not name commands to run")
        return path
    if isinstance(root, Path):
        return root / path
    if root.startswith("pipe:"):
        return _locate_in_command(root, path)
    if root.startswith(("http://", "https://")):
        parts = urlsplit(root)
        return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{quote(path)}"))
    return f"{root.rpartition('/')[0]}/{path}"


def shown(location: Path | str) -> str:
    """A path or URL for messages, without the query, which may hold a key."""
    text = str(location)
    return text.partition("?")[0] if text.startswith(("http://", "https://")) else text


def _locate_in_command(command: str, path: str) -> str:
    if len(MANIFEST_NAME.findall(command)) != 1:
        raise ConfigError(f"{command}: the command must name the manifest as NAME.json, once, to tell where shards lie")
    if not PLAIN_PATH.fullmatch(path):
        raise ConfigError(f"{command}: shard {path!r}: only letters, digits and ./+=,@%_- may go into a command")
    return MANIFEST_NAME.sub(lambda _: path, command)


# Opening: OSError where another try may help, SampleError or ConfigError where none will


@contextmanager
def open_http(url: str, offset: int) -> Iterator[Source]:
    request = Request(url, headers={"User-Agent": "depthkit"} | _range(offset))
    try:
        with urlopen(request, timeout=TIMEOUT) as response:
            start = offset if response.status == 206 else 0
            yield Source(response, start, None if response.length is None else start + response.length)
    except HTTPError as error:
        raise _refused(url, error.code, str(error.reason)) from error
    except HTTPException as error:
        raise OSError(repr(error)) from error


@contextmanager
def open_s3(url: str, offset: int) -> Iterator[Source]:
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
    except ImportError as error:
        raise ConfigError(f"{url}: reading s3:// needs boto3: pip install 'depthkit[s3]'") from error
    bucket, _, key = url.removeprefix("s3://").partition("/")
    arguments = {"Bucket": bucket, "Key": key} | _range(offset)
    try:
        # A session of its own: the one that boto3 shares is not safe among threads.
        response = boto3.session.Session().client("s3").get_object(**arguments)
        with closing(response["Body"]) as body:
            start = offset if response["ResponseMetadata"]["HTTPStatusCode"] == 206 else 0
            yield Source(body, start, start + response["ContentLength"])
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        raise _refused(url, status, error.response["Error"].get("Code", "")) from error
    except NoCredentialsError as error:
        raise ConfigError(f"{url}: {error}; boto3 looks in the environment and in ~/.aws") from error
    except BotoCoreError as error:
        raise OSError(str(error)) from error


@contextmanager
def open_stream(url: str, offset: int) -> Iterator[Source]:
    from webdataset.gopen import gopen

    try:
        stream = gopen(url, "rb")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with stream:
        yield Source(stream, 0)


OPENERS: dict[str, Callable[[str, int], AbstractContextManager[Source]]] = {
    "http": open_http,
    "https": open_http,
    "s3": open_s3,
}


def open_url(url: str, offset: int = 0) -> AbstractContextManager[Source]:
    """Open a URL at `offset`, or at 0 where its server or scheme knows no offsets."""
    return OPENERS.get(url.partition(":")[0].lower(), open_stream)(url, offset)


def _range(offset: int) -> dict[str, str]:
    return {"Range": f"bytes={offset}-"} if offset else {}


def _refused(url: str, status: int, reason: str) -> Exception:
    message = f"HTTP status {status} {reason}"
    if status == 416:
        return RangeRefusedError(message)
    if status in (408, 429) or status >= 500:
        return OSError(message)
    return SampleError(f"{shown(url)}: {message}")


# Fetching


def read_url(url: str) -> bytes:
    """The whole content of a small file; ConfigError names the URL when it cannot be had."""
    return _persistently(url, lambda source: bytes(source.stream.read()))


def fetch(url: str, file: FileIO) -> None:
    """Write all of a URL, of which nothing is known, to `file`; the errors are those of `read_url` and `download`."""
    num_bytes = _persistently(url, lambda source: source.end)
    if num_bytes is None:
        _persistently(url, lambda source: _copy(source, file))
    else:
        _fill(url, file, num_bytes)


def _persistently(url: str, use: Callable[[Source], T]) -> T:
    """What `use` gives for the open URL, tried again while it raises OSError."""
    for failures in range(1, MAX_FAILURES + 1):
        try:
            with open_url(url) as source:
                result = use(source)
            return result
        except SampleError as error:
            raise ConfigError(str(error)) from error
        except CacheError:
            raise
        except OSError as error:
            reason = str(error)
        if failures < MAX_FAILURES:
            _wait(failures)
    raise ConfigError(f"{shown(url)}: {reason}, {MAX_FAILURES} times in a row")


def _copy(source: Source, file: FileIO) -> None:
    file.truncate(0)
    file.seek(0)
    while chunk := source.stream.read(CHUNK):
        _write(file, chunk, len(chunk))


def download(url: str, file: FileIO, *, num_bytes: int, sha256: str) -> None:
    """Complete `file`, which may hold the beginning already, and verify it.

    The beginning needs no mark of the version it is from: sha256 judges the whole, and wrong bytes are fetched again.
    SampleError when the URL cannot be reached or its bytes stay wrong, CacheError when they cannot be written.
    """
    for _ in range(MAX_WRONG):
        _fill(url, file, num_bytes)
        found = _difference(file, num_bytes, sha256)
        if found is None:
            return
        file.truncate(0)
    raise SampleError(f"{shown(url)}: {found}; fetched {MAX_WRONG} times. Upload the file or write the manifest again")


def _fill(url: str, file: FileIO, num_bytes: int) -> None:
    """Append to `file` until it has `num_bytes`, one byte more if the URL has more, fewer if it ends there."""
    failures = 0
    while (before := _size(file)) < num_bytes:
        try:
            _append(url, file, num_bytes)
            reason = "the connection was cut"
        except (CacheError, RangeRefusedError) as error:
            if isinstance(error, CacheError):
                raise
            return
        except OSError as error:
            reason = str(error)
        after = _size(file)
        if after >= num_bytes:
            return
        failures = 1 if after - before >= CHUNK else failures + 1
        if failures >= MAX_FAILURES:
            raise SampleError(f"{shown(url)}: {reason}, {failures} times in a row; has {after} of {num_bytes} bytes")
        _wait(failures)


def _append(url: str, file: FileIO, num_bytes: int) -> None:
    with open_url(url, _size(file)) as (stream, start, _):
        file.truncate(start)
        file.seek(start)
        read = getattr(stream, "read1", stream.read)  # what has arrived, not only full chunks
        while chunk := read(min(CHUNK, num_bytes + 1 - start)):
            _write(file, chunk, num_bytes - start)
            start += len(chunk)


def _write(file: FileIO, chunk: bytes, needed: int) -> None:
    rest = memoryview(chunk)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        path = Path(os.fsdecode(file.name))
        free = shutil.disk_usage(path.parent).free
        raise CacheError(f"{path}: {error.strerror}: {needed} bytes are needed, {free} are free") from error


def _difference(file: FileIO, num_bytes: int, sha256: str) -> str | None:
    """What is wrong with the content; None if nothing is."""
    size = _size(file)
    if size != num_bytes:
        return f"{'more' if size > num_bytes else 'fewer'} than the {num_bytes} bytes that the manifest says"
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == sha256 else f"sha256 is {digest}, the manifest says {sha256}"


def _size(file: FileIO) -> int:
    return os.fstat(file.fileno()).st_size


def _wait(failures: int) -> None:
    time.sleep(FIRST_DELAY * 2 ** (failures - 1) * _jitter.uniform(0.5, 1))
