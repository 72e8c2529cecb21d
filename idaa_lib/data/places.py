"""Where the bytes of images lie, in files and in tar shards, and how they are read."""

from __future__ import annotations

import os
import re
import stat
import tarfile
from pathlib import Path
from typing import NamedTuple

from idaa_lib.data.layout import PARTS

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
    check_size(check_regular(path))
    return path.read_bytes()


def check_regular(path: Path) -> int:
    """The bytes of a regular file; OSError where it is none, since a pipe or device might never
    end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is no file, but a folder, pipe or device")
    return status.st_size


def check_size(size: int) -> None:
    """Raises OSError where a file of so many bytes is no image that could be held."""
    if size > 2**30:
        raise OSError(f"it has {size / 2**30:.3g} GiB, and an image file at most 1")


def list_shards(root: Path, shards: list[str]) -> dict[str, Place]:
    """What tar files hold, by name, and where it lies in them.

    They are as `python -m idaa_lib.data shard` writes them, with the folders of the names; or as
    webdataset has them: class numbers beside the images, in `.cls`. The split is that of the folder
    in a name; else of a word of the shard's name, or of a folder that it lies in: train, val, test,
    or as `PARTS` has them. Raises ValueError where one is damaged.
    """
    # By shard and name: of members of one name in one shard the last is the file.
    classes, members = dict[str, str](), dict[tuple[str, str], Place]()
    for shard in shards:
        try:
            check_regular(root / shard)
            with tarfile.open(root / shard, "r:") as archive:
                files = dict[str, Place]()
                for member in archive:
                    name, target = plain_name(member.name), plain_name(member.linkname)
                    if member.isreg():
                        place = Place(shard, member.offset_data, member.size)
                    elif member.islnk() and target in files:  # tar packs a file's content once
                        place = files[target]
                    else:
                        continue
                    files[name] = place
                    if name.endswith(".cls"):
                        number = read_place(root, place).decode("ascii", "replace").strip()
                        if number != "-1":  # `shard` writes it where there is no class
                            classes[f"{shard}/{name[:-4]}"] = f"{number:0>6}/"
                    else:
                        members[shard, name] = place
                # To tarfile a damaged header, and the end of a file that was cut off, are the end.
                if read_place(root, Place(shard, archive.offset, 512)) != bytes(512):
                    raise tarfile.ReadError("it has no end")
        except (tarfile.TarError, OSError) as error:
            what = f"{root / shard} is no readable tar ({error})"
            raise ValueError(f"{what}: copy it again") from error

    numbers = list[str]()
    for shard, name in members:
        key = f"{shard}/{name}"  # without its extension, or all of them
        stems = key.rpartition(".")[0], re.sub(r"\.[^/]*$", "", key)
        numbers.append(classes.get(stems[0]) or classes.get(stems[1], ""))
    folders = [name.rpartition("/")[0] for _, name in members]
    pairs = {pair for pair in zip(folders, numbers, strict=True) if all(pair)}
    # Where each folder has one class alone, the folders are the classes.
    plain = len(pairs) == len({folder for folder, _ in pairs})
    places = dict[str, Place]()
    for (shard, name), folder, number in zip(members, folders, numbers, strict=True):
        place, top = members[shard, name], _split_folder(shard)
        if folder and plain:
            if not PARTS.keys() & {*folder.lower().split("/")}:
                folder = f"{top}{folder}"
            file = name.rpartition("/")[2]
            name = f"{folder}/{file}"
            if name in places:  # another image, of another shard
                name = f"{folder}/{shard}/{file}"
        else:
            part, plain_file = PARTS.get(name.partition("/")[0].lower()), name.replace("/", "_")
            top = f"{part}/" if part else top
            if number:
                name = f"{top}{number}{shard}/{name}"
            else:  # in no folder, which would be a class
                name = f"{top}{plain_file}"
                if name in places:
                    name = f"{top}{shard.replace('/', '_')}_{plain_file}"
        places[name] = place
    return places


def _split_folder(shard: str) -> str:
    """train/, val/ or test/ where the name of a shard, or a folder above it, says it; else
    nothing."""
    *folders, name = shard.lower().split("/")
    words = *re.findall("[a-z]+", name), *folders
    return next((f"{PARTS[word]}/" for word in words if word in PARTS), "")


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
