"""Photographs as tar shards, and room in the cache.

python -m idaa_lib.data shard FOLDER OUT   # the images of a folder as tar files in OUT
python -m idaa_lib.data clean [all]        # remove decoded images that no data set has any more
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
from filelock import Timeout
from tqdm import tqdm

from idaa_lib.data.cached import data_root
from idaa_lib.data.layout import PARTS
from idaa_lib.data.places import read_place
from idaa_lib.data.pool import NAME, is_current, lock, read_sealed
from idaa_lib.data.sources import Listing, find_source

SHARD_BYTES = 2**29  # of images in a tar file, about


def shard(folder: str, out: Path) -> Path:
    """The new folder `out` of tar files that hold the images of a folder, byte by byte.

    It is the same data set: the same classes, splits and fingerprint. Beside each image lies its
    class number, `.cls`, as webdataset reads it. The tar files of each part, train or val, are
    their own. `out` appears in full or not at all.

    Raises ValueError where the folder holds no images in files, FileExistsError where `out` is
    there, OSError where it cannot be written.
    """
    listing = find_source(folder, data_root(), download=False).listing()
    if not listing.places:
        raise ValueError(f"{folder} holds no images in files of their own: unpack it first")
    if out.exists():
        raise FileExistsError(f"{out} is there: give a new folder, or move it away")
    draft = out.with_name(f"{out.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
    draft.mkdir(parents=True)
    try:
        if shutil.disk_usage(draft).free < (need := sum(p.length for p in listing.places)):
            raise OSError(f"{out} needs {need / 2**20:,.1f} MiB, which its disk has not free")
        _write(listing, draft)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out


def _write(listing: Listing, out: Path) -> None:
    parts: dict[str, list[int]] = {}
    for i, name in enumerate(listing.names):
        top = Path(name).parts[0].lower()
        parts.setdefault(PARTS.get(top, "images"), []).append(i)
    with tqdm(total=len(listing.names), desc="writing", unit="image", delay=2) as bar:
        for part, items in parts.items():
            sizes = np.array([listing.places[i].length for i in items])
            shards = sizes.cumsum() // SHARD_BYTES
            for number in range(int(shards[-1]) + 1):
                with tarfile.open(out / f"{part}-{number:06}.tar", "w:") as archive:
                    for i in np.array(items)[shards == number].tolist():
                        name = listing.names[i]
                        _add(archive, name, read_place(listing.root, listing.places[i]))
                        label = str(listing.labels[i]).encode()
                        _add(archive, f"{name.rpartition('.')[0]}.cls", label)
                        bar.update()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def clean(everything: bool = False) -> int:
    """Bytes that became free: decoded images are removed that no data set has any more, whose
    folder is gone or has changed. `everything` removes the others too, which are made again when
    they are needed. Each pool is printed, with its size and whether it is kept, removed, or in use
    by a process that writes it. Files that are no pool by their name stay.
    """
    cache, removed, used = data_root() / "cache", 0, set[str]()
    ours = [path for path in sorted(cache.glob("*")) if NAME.fullmatch(path.name)]
    for path in ours:
        if index := read_sealed(path) if path.suffix == ".json" else None:
            if is_current(index):
                used.add(index["entry"])
            elif not everything:
                path.unlink()
    for pool in filter(Path.is_dir, ours):
        stats = [file.stat() for file in pool.iterdir()]
        size = sum(stat.st_size for stat in stats)
        fate = "kept" if pool.name in used and not everything else "removed"
        try:
            if fate == "removed":
                with lock(cache, pool.name.rsplit("-", 2)[0]).acquire(timeout=0):
                    shutil.rmtree(pool)
                # Copies of a folder share a file, whose room is free when the last one goes.
                removed += sum(stat.st_size for stat in stats if stat.st_nlink == 1)
        except Timeout:
            fate = "in use"
        print(f"{size / 2**20:10,.0f} MiB  {fate}  {pool.name}")
    return removed


def main(words: list[str]) -> int:
    """The exit status of a command line."""
    try:
        match words:
            case ["shard", folder, out]:
                print(
                    f"{shard(folder, Path(os.path.expanduser(out)))} holds the images of {folder}."
                )
            case ["clean"] | ["clean", "all"]:
                print(f"{clean(words[1:] == ['all']) / 2**20:,.0f} MiB removed.")
            case [*_, "-h" | "--help"]:
                print(__doc__)
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except (OSError, ValueError) as error:
        print(f"{error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
