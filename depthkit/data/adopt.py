"""A manifest for WebDataset tars that somebody else has packed and that stay where they are."""

import hashlib
import tempfile
from io import FileIO
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from depthkit.data.cache import ShardCache
from depthkit.data.index import scan_tar
from depthkit.data.manifest import Manifest, Shard
from depthkit.data.remote import fetch, is_remote
from depthkit.data.writer import describe_shard


def manifest_of_tars(tars: str, cache: ShardCache | None = None, **facts: Any) -> Manifest:
    """The manifest of existing tars; `facts` are its other fields. Every tar is read once and none is kept.

    `tars` is a path or URL as WebDataset takes it, with braces for many:

        tars = "https://example.org/photos/shards-{000000..000063}.tar"
        manifest = manifest_of_tars(tars, name="photos", split="train", target=None, licence="CC BY 4.0", source=tars)
        save_manifest(manifest, Path("data/photos/manifest.json"))

    Samples must have one image each. SampleError when a tar is damaged, ConfigError when it cannot be reached.
    """
    cache = cache or ShardCache()
    describe = {True: lambda tar: describe_remote(tar, cache.folder), False: describe_local}
    return Manifest(shards=tuple(describe[is_remote(tar)](tar) for tar in braceexpand(tars)), **facts)


def describe_local(tar: str) -> Shard:
    return describe_shard(Path.cwd(), str(Path(tar).absolute()))


def describe_remote(url: str, folder: Path) -> Shard:
    """What a manifest says of the tar behind a URL, which lies in `folder` while it is looked at."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp") as named, FileIO(named.name, "r+") as file:
        fetch(url, file)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        index = scan_tar(Path(named.name))
    return Shard(path=url, num_samples=len(index.samples), num_bytes=index.num_bytes, sha256=digest)
