"""Where images come from: the embedded photographs, torchvision's data sets, folders and zips.

Each source knows a key of its content, cheap enough to be asked on every call, and how to list its
items with their splits and labels; `images` decodes them.
"""

import hashlib
import io
import os
import re
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from PIL import Image

from idaa_lib.data import photos

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_TWO = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE = {**_TWO, "val": {"split": "val"}}
TORCHVISION: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {  # name: class, part: arguments
    "cifar10": ("CIFAR10", {"train": {"train": True}, "test": {"train": False}}),
    "cifar100": ("CIFAR100", {"train": {"train": True}, "test": {"train": False}}),
    "stl10": ("STL10", _TWO),
    "stl10-unlabeled": ("STL10", {**_TWO, "train": {"split": "unlabeled"}}),
    "svhn": ("SVHN", _TWO),
    "flowers102": ("Flowers102", _THREE),
    "oxfordiiitpet": ("OxfordIIITPet", {"train": {"split": "trainval"}, "test": {"split": "test"}}),
    "dtd": ("DTD", _THREE),
    "fgvcaircraft": ("FGVCAircraft", _THREE),
    "food101": ("Food101", _TWO),
    "caltech101": ("Caltech101", {"all": {}}),
}
NAMES = ("photos", *TORCHVISION)
# Data sets that nobody may hand on: folders in the data folder, laid out as this page says.
FOLDERS = ("birdsnap", "cub200")
LAYOUT = "docs/transfer-data.md"


@dataclass(frozen=True)
class Listing:
    """What a source holds, before any decoding; `read(i)` gives item i in any mode, and its label.

    `names[i]` is what an error calls item i, `splits[i]` its split ("train", "val" or "test").
    """

    classes: tuple[str, ...]
    names: list[str]
    splits: list[str]
    read: Callable[[int], tuple[Image.Image, int]]


class Origin(Protocol):
    name: str

    def key(self) -> str: ...

    def listing(self) -> Listing: ...


def find_source(source: str | Path, data: Path, download: bool) -> Origin:
    if source == "photos":
        return _Photos()
    if isinstance(source, str) and source in TORCHVISION:
        return _Torchvision(source, data, download)
    for path in (Path(source).expanduser(), data / source):
        if path.is_dir() or zipfile.is_zipfile(path):
            return _Files(path)
        if path.exists():
            raise ValueError(f"{path} is neither a folder nor a readable zip: give one of the two")
    if source in FOLDERS:
        raise FileNotFoundError(
            f"{source} is not in {data / source}: put it there as {LAYOUT} says"
        )
    raise FileNotFoundError(
        f"source={str(source)!r} is no existing path and no known data set: give the path of a "
        f"folder or zip of images, or one of {', '.join(NAMES)}"
    )


def _split(part: str, official: set[str], name: str) -> str:
    """The split of an item that its source files under `part` ("all" where it knows no splits).

    Where the source has no val (or no test) of its own, a hash of the name decides: adding a file
    moves no other, and every machine agrees.
    """
    bucket = int(sha256(f"idaa:{name}"), 16) % 10
    if bucket == 0 and part in ("all", "train") and "val" not in official:
        return "val"
    if part == "all":
        return "test" if bucket == 1 else "train"
    return part


class _Photos:
    name = "photos"

    def key(self) -> str:
        rules = (photos.COUNTS, photos.STRIPS, photos.SIDES)
        return _key([(photo, *_stamp(path)) for photo, path in photos.paths().items()], rules)

    def listing(self) -> Listing:
        whole = {photo: Image.open(path).convert("RGB") for photo, path in photos.paths().items()}
        crops, classes = photos.crops(), tuple(photos.FILES)
        return Listing(
            classes,
            [f"crop {crop.box} of {crop.photo}" for crop in crops],
            [crop.split for crop in crops],
            lambda i: (whole[crops[i].photo].crop(crops[i].box), classes.index(crops[i].photo)),
        )


class _Torchvision:
    """A data set that torchvision downloads and parses, in a folder of its own: data/<name>/."""

    def __init__(self, name: str, data: Path, download: bool) -> None:
        self.name, self.download = name, download
        self.folder = data / name.removesuffix("-unlabeled")

    def key(self) -> str:
        return _key(_walk(self.folder), self.name)

    def listing(self) -> Listing:
        from torchvision import datasets  # a second to import, and a cached set does without

        kind, parts = TORCHVISION[self.name]
        try:
            sets = {
                part: getattr(datasets, kind)(self.folder, download=self.download, **arguments)
                for part, arguments in parts.items()
            }
        except (OSError, RuntimeError) as error:  # torchvision says "not found" as RuntimeError
            why = "could not be downloaded" if self.download else "may not be with download=False"
            raise FileNotFoundError(
                f"{self.name} is not complete in {self.folder} and {why} ({error}): put there what "
                f"torchvision.datasets.{kind}(root) reads, or use 'photos', which needs no network"
            ) from error
        items = [(part, n) for part, images in sets.items() for n in range(len(images))]
        some = next(iter(sets.values()))
        names = getattr(some, "classes", None) or getattr(some, "categories", None)  # Caltech101

        def read(i: int) -> tuple[Image.Image, int]:
            part, n = items[i]
            image, label = sets[part][n]
            return image, int(label)

        return Listing(
            tuple(names or "0123456789"),  # SVHN's digits have no names
            [f"image {n} of {self.name}'s {part} part" for part, n in items],
            [_split(part, set(parts), str(n)) for part, n in items],
            read,
        )


class _Files:
    """A folder, or a zip read in place, of images in class folders or in none."""

    def __init__(self, path: Path) -> None:
        self.path, self.zipped = path, not path.is_dir()
        self.name = path.stem if self.zipped else path.resolve().name

    def members(self) -> list[tuple[str, int, int]]:
        """Name (a folder's ends in "/"), size and CRC or time of change of everything inside."""
        if not self.zipped:
            return _walk(self.path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = [(i.filename, i.file_size, i.CRC) for i in archive.infolist()]
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.path} is no whole zip ({error}): copy it again") from error
        leaves = re.compile(r"([A-Za-z]:|[/\\])|(.*[/\\])?\.\.([/\\]|$)", re.DOTALL)
        for member, _, _ in members:
            if leaves.match(member):
                raise ValueError(f"{self.path} has a member {member!r} that leaves it: repack it")
        return members

    def key(self) -> str:
        return _key(self.members())

    def listing(self) -> Listing:
        names, splits, folders = _arrange(str(self.path), [name for name, _, _ in self.members()])
        classes = tuple(sorted({folder for folder in folders if folder}))
        numbers = {folder: n for n, folder in enumerate(classes)}
        labels = [numbers.get(folder, -1) for folder in folders]
        # One handle for all threads: each more would hold its own 60,000 entries of CIFAR-10. The
        # lock is needed, as ZipFile counts its open members without one.
        archive, lock = zipfile.ZipFile(self.path) if self.zipped else None, threading.Lock()

        def read(i: int) -> tuple[Image.Image, int]:
            if archive is None:
                content = (self.path / names[i]).read_bytes()
            else:
                with lock:
                    content = archive.read(names[i])
            return Image.open(io.BytesIO(content)), labels[i]

        return Listing(classes, [f"{self.path}/{name}" for name in names], splits, read)


def _arrange(where: str, members: list[str]) -> tuple[list[str], list[str], list[str]]:
    """From the names inside a folder or zip: its images, and each one's split and class ("": none).

    ValueError where there is no image, a class folder is empty, only test/ has a class, or it is
    unclear what belongs where.
    """
    hidden = re.compile(r"(^|/)(\.|__MACOSX/)")
    seen = sorted(name for name in members if not hidden.search(name))
    images = [name for name in seen if PurePosixPath(name).suffix.lower() in EXTENSIONS]
    if not images:
        raise ValueError(f"{where} holds no image: looked for {', '.join(EXTENSIONS)}")
    entries = images + [name for name in seen if name.endswith("/")]
    top = ""  # a folder that holds everything else is a wrapping, no class
    while True:
        inside = {name[len(top) :].split("/")[0] for name in entries if not top.startswith(name)}
        parts, single = inside & {"train", "val", "test"}, f"{top}{min(inside)}"
        if len(inside) > 1 or parts or single in images:
            break
        top = f"{single}/"
    for name in sorted(inside - parts):
        meant = {"validation": "val", "valid": "val", "testing": "test", "training": "train"}
        right = meant.get(name.lower(), name.lower())
        if right in ("train", "val", "test") and name != right:
            raise ValueError(f"{where} has a folder {name!r}: rename it to {right!r}")
    if parts and "train" not in parts:
        raise ValueError(f"{where} has {min(parts)}/ but no train/: add train/, or rename it")

    places = {}  # of every image and folder: part, class, and the name that the hash sees
    holding: dict[str, set[str]] = {"train": set(), "val": set(), "test": set(), "all": set()}
    for name in entries:
        part, rest = "all", name[len(top) :]
        if parts and rest:
            part, _, rest = rest.partition("/")
            if part not in parts:
                raise ValueError(f"{where} has {name!r} beside train/: move it inside")
        part = "all" if parts == {"train"} else part
        places[name] = part, rest.rpartition("/")[0].split("/")[0], rest
        if not name.endswith("/"):
            holding[part].add(places[name][1])
    trained = holding["train"] | holding["all"]
    labelled = any(set().union(*holding.values()))
    for name, (part, folder, _) in places.items():
        if folder and folder not in holding[part]:
            raise ValueError(f"class folder {name!r} of {where} holds no image: fill or remove it")
        if folder and folder not in trained:
            raise ValueError(f"{where} has class {folder!r} in {part}/ but not in train/: add it")
        if labelled and not folder and not name.endswith("/"):
            raise ValueError(f"{name!r} of {where} lies beside class folders: move it into one")
    splits = [_split(places[name][0], parts, places[name][2]) for name in images]
    return images, splits, [places[name][1] for name in images]


def _stamp(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _walk(root: Path) -> list[tuple[str, int, int]]:
    """Everything below a folder as (name, size, mtime in ns); folders as (name + "/", 0, 0)."""
    found: list[tuple[str, int, int]] = []
    for folder, folders, files in os.walk(root, followlinks=True):
        base = Path(folder).relative_to(root).as_posix() + "/" if Path(folder) != root else ""
        found += [(f"{base}{name}/", 0, 0) for name in folders]
        found += [(f"{base}{name}", *_stamp(f"{folder}/{name}")) for name in files]
    return found


def _key(members: list[tuple[str, int, int]], *more: object) -> str:
    return sha256(repr((sorted(members), *more)))


def sha256(text: str, more: bytes = b"") -> str:
    return hashlib.sha256(text.encode() + more).hexdigest()
