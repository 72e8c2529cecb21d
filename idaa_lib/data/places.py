"""Where the bytes of images lie, in files and in tar shards, and how they are read."""

from __future__ import annotations

import os
import re
import stat
import tarfile
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[2]
# What ships with the library: images of CIFAR-10 in images/, and finished runs by their stages.
STARTER = PROJECT / "data" / "starter"


class Place(NamedTuple):
    """Where the bytes of an item lie: in which file below the source, from where on, how many."""

    file: str
    offset: int
    length: int


def find_root(variable: str, default: str) -> Path:
    """The folder that a variable of the environment names, else `default`; from the project where
    it is relative. ValueError where it begins with `~` and a user who is not there."""
    folder = os.path.expanduser(os.environ.get(variable) or default)
    if folder.startswith("~"):
        raise ValueError(f"{variable}={folder!r} is of a user who is not there: give a full path")
    return PROJECT / folder


def read_file(path: Path) -> bytes:
    """The content of an image file; OSError where it is no regular file or has over 1 GiB."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe or device might never end
        raise OSError("it is no file, but a folder, pipe or device")
    check_size(status.st_size)
    return path.read_bytes()


def check_size(size: int) -> None:
    """Raises OSError where a file of so many bytes is no image that could be held."""
    if size > 2**30:
        raise OSError(f"it has {size / 2**30:.3g} GiB, and an image file at most 1")


def list_shards(root: Path, shards: list[str]) -> dict[str, Place]:
    """What tar files hold, by name, and where it lies in them.

    They are as `python -m idaa_lib.data shard` writes them, with the folders of the names; or as
    webdataset has them: class numbers beside the images, in `.cls`, and the part, train or val, in
    the name of the shard. Raises ValueError where one is damaged.
    """
    places = dict[str, Place]()
    for shard in shards:
        part = re.search("train|val|test", shard.rpartition("/")[2].lower())
        classes, flat = dict[str, str](), dict[str, Place]()
        try:
            with tarfile.open(root / shard, "r:") as archive:
                for member in filter(tarfile.TarInfo.isreg, archive):
                    place = Place(shard, member.offset_data, member.size)
                    name = plain_name(member.name)
                    if not name.endswith(".cls"):
                        (places if "/" in name else flat)[name] = place
                    elif "/" not in name:
                        number = read_place(root, place).decode("ascii", "replace").strip()
                        classes[name[:-4]] = f"{number:0>6}/"
        except tarfile.TarError as error:
            what = f"{root / shard} is no readable tar ({error})"
            raise ValueError(f"{what}: copy it again") from error
        for name, place in flat.items():
            folders = f"{part[0]}/" if part else "", classes.get(name.partition(".")[0], "")
            places[f"{''.join(folders)}{shard}/{name}"] = place
    return places


def plain_name(member: str) -> str:
    """A member's name without the ./ that it begins with where `tar -C folder .` packed it."""
    return re.sub(r"^(\./+)+", "", member)


def read_place(root: Path, place: Place) -> bytes:
    """The bytes that lie there; OSError where they are over 1 GiB."""
    check_size(place.length)
    with open(root / place.file, "rb") as file:
        file.seek(place.offset)
        return file.read(place.length)


def read_stamp(path: str | Path) -> tuple[int, int]:
    """Size and time of change in ns; (-1, -1) where there is nothing, as behind a broken link."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns
