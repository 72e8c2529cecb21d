"""Where images come from: the embedded photographs, torchvision's data sets, folders and zips.

Each source says what it consists of, cheap enough to be asked on every call, and lists its items
with their splits and labels; `cached` decodes them.
"""

import io
import os
import pickle
import re
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from idaa_lib.data import photos
from idaa_lib.data.layout import (
    EXTENSIONS,
    HIDDEN,
    PARTS,
    arrange,
    compose,
    list_some,
    split_by_name,
)
from idaa_lib.data.places import (
    STARTER,
    Place,
    check_size,
    list_shards,
    plain_name,
    read_file,
    read_place,
    read_stamp,
)

_TWO = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE = {**_TWO, "val": {"split": "val"}}
TORCHVISION: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {  # name: class, part: arguments
    "cifar10": ("CIFAR10", {"train": {"train": True}, "test": {"train": False}}),
    "cifar100": ("CIFAR100", {"train": {"train": True}, "test": {"train": False}}),
    "stl10": ("STL10", _TWO),
    "stl10-unlabeled": ("STL10", {**_TWO, "train": {"split": "unlabeled"}}),
    "stl10-all": ("STL10", {**_TWO, "train": {"split": "train+unlabeled"}}),
    "svhn": ("SVHN", _TWO),
    "flowers102": ("Flowers102", _THREE),
    "oxfordiiitpet": ("OxfordIIITPet", {"train": {"split": "trainval"}, "test": {"split": "test"}}),
    "dtd": ("DTD", _THREE),
    "fgvcaircraft": ("FGVCAircraft", _THREE),
    "food101": ("Food101", _TWO),
    "caltech101": ("Caltech101", {"all": {}}),
}
NAMES = ("photos", "starter", *TORCHVISION)
# Data set to train on, most of whose images have no label → the one with labels, to judge with.
LABELLED = {"stl10-unlabeled": "stl10", "stl10-all": "stl10"}
# Data sets that may not be redistributed: folders in the data folder, laid out as a page says.
LAYOUT = "docs/transfer-data.md"
FOLDERS = {"birdsnap": LAYOUT, "cub200": LAYOUT, "mini-imagenet": "docs/mini-imagenet.md"}

Member = tuple[str, int, int]  # name (a folder's ends in "/"), size, time of change in ns or CRC


@dataclass(frozen=True)
class Listing:
    """What a source holds, before any decoding; `read(i)` gives item i in any mode, and its label.

    `names[i]` is what an error calls item i, of files their path below the source; `splits[i]` is
    its split ("train", "val" or "test").
    `notes`: sentences that say what of the source is left out, or read in another way. `places`, in
    the folder `root`, and `labels`, of a source whose items lie as they are in files.
    """

    classes: tuple[str, ...]
    names: list[str]
    splits: list[str]
    read: Callable[[int], tuple[Image.Image, int]]
    notes: list[str] = field(default_factory=list)
    root: Path = Path()
    places: list[Place] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


class Source:
    """A folder of images, or of tar files that hold them. The subclasses below are other kinds of
    sources, with the same methods `members`, `watch` and `listing`.

    classes: names of class folders, of which the images are taken alone, in the order of labels
    (none: all, sorted).
    """

    def __init__(self, path: Path, name: str, classes: tuple[str, ...] = ()) -> None:
        self.path, self.name, self.classes = path.absolute(), name, classes

    def members(self) -> list[Member]:
        """All that is not hidden: other content has other members.

        Raises ValueError where a folder may not be read.
        """
        members: list[Member] = []
        for folder, folders, files in os.walk(self.path, onerror=_refuse, followlinks=True):
            inner = Path(folder).relative_to(self.path).as_posix()
            base = "" if inner == "." else f"{inner}/"
            folders[:] = [name for name in folders if not HIDDEN.search(name)]
            # Where class folders lie beside one another, the files of the others need no look.
            outside = not {*self.classes} & {*compose(inner).split("/")}
            if outside and not PARTS.keys() & {name.lower() for name in folders}:
                folders[:] = [n for n in folders if compose(n) in self.classes] or folders
            loops = [name for name in folders if _leads_up(Path(folder, name))]
            folders[:] = [name for name in folders if name not in loops]
            members += [(f"{base}{name}", -1, -1) for name in loops]
            members += [(f"{base}{name}/", 0, 0) for name in folders]
            files = [name for name in files if not HIDDEN.search(name)]
            members += [(f"{base}{name}", *read_stamp(f"{folder}/{name}")) for name in files]
        return members

    def watch(self, members: list[Member]) -> list[str]:
        """Paths whose size or time of change tells that the content changed.

        All folders, whose time changes when an entry is added, removed or renamed, and of the files
        up to 4,096, evenly spaced: where there are more, one that is written anew under its own
        name can go unseen.
        """
        folders = [name for name, _, _ in members if name.endswith("/")]
        files = [name for name, _, _ in members if not name.endswith("/")]
        watched = ["", *folders, *files[:: len(files) // 4096 + 1]]
        return [str(self.path / name) for name in watched]

    def listing(self) -> Listing:
        """Its items; may download them. ValueError where it is unclear what belongs where."""
        members = self.members()
        broken = {name for name, size, _ in members if size < 0}
        places = {name: Place(name, 0, size) for name, size, _ in members}
        shards = [name for name in places if name.endswith(".tar")]
        if shards and not any(name.lower().endswith((*EXTENSIONS,)) for name in places):
            inside = list_shards(self.path, sorted(shards))
            listing = self._list([*inside], lambda n: read_place(self.path, inside[n]), (), inside)
            if len(shards) > 1 and not listing.classes:  # as the tars inside ImageNet's have it
                listing.notes.append(
                    "no image has a class, since no tar holds folders or class numbers (.cls): if "
                    "each tar is a class, unpack it into a folder of its name"
                )
            return listing
        return self._list([*places], lambda n: read_file(self.path / n), broken, places)

    def _list(
        self,
        members: list[str],
        read_bytes: Callable[[str], bytes],
        broken: Collection[str] = (),
        places: Mapping[str, Place] | None = None,
    ) -> Listing:
        names, splits, folders, notes = arrange(str(self.path), members, self.classes, broken)
        classes = self.classes or tuple(sorted({folder for folder in folders if folder}))
        labels = {"": -1} | {folder: n for n, folder in enumerate(classes)}

        def read(i: int) -> tuple[Image.Image, int]:
            return Image.open(io.BytesIO(read_bytes(names[i]))), labels[folders[i]]

        listing = Listing(classes, names, splits, read, notes)
        if places is None:
            return listing
        own = [places[name] for name in names], [labels[folder] for folder in folders]
        return replace(listing, root=self.path, places=own[0], labels=own[1])


class Zip(Source):
    """A zip of images, read in place."""

    def members(self) -> list[Member]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = [(i.filename, i.file_size, i.CRC) for i in archive.infolist()]
        except zipfile.BadZipFile as error:
            if re.search(r"\.tar(\.\w+)?$|\.tgz$", self.path.name):
                raise ValueError(
                    f"{self.path} is a tar: give the folder that it lies in, or unpack it "
                    f"where it is compressed"
                ) from error
            what = f"{self.path} is neither a folder nor a readable zip ({error})"
            raise ValueError(f"{what}: give either, or copy it again") from error
        leaves = re.compile(r"([A-Za-z]:|[/\\])|(.*[/\\])?\.\.([/\\]|$)", re.DOTALL)
        for name, _, _ in members:
            if leaves.match(name):
                raise ValueError(f"{self.path} has a member {name!r} that leaves it: repack it")
        return members

    def watch(self, members: list[Member]) -> list[str]:
        return [str(self.path)]

    def listing(self) -> Listing:
        names = [name for name, _, _ in self.members()]
        # Some programs for Windows separate folders by backslashes, with a slash at most behind a
        # folder's name. (Elsewhere a folder's name may hold one, and what it holds has a slash.)
        windows = any("\\" in name and "/" not in name for name in names)
        inside = {
            plain_name(name.replace("\\", "/") if windows and "/" not in name[:-1] else name): name
            for name in names
        }
        inside.pop("", None)
        # One handle for all threads: each more would hold its own 60,000 entries of CIFAR-10. The
        # lock is needed, as ZipFile counts its open members without one.
        archive, lock = zipfile.ZipFile(self.path), threading.Lock()

        def read_bytes(name: str) -> bytes:
            member = archive.getinfo(inside[name])
            check_size(member.file_size)
            with lock:
                return archive.read(member)

        return self._list(list(inside), read_bytes)


class Pickles(Source):
    """mini-ImageNet as the authors keep it: train.pkl and test.pkl, a dict each of `images`, uint8
    (N, height, width, 3), and `labels`, N whole numbers."""

    parts = ("train", "test")

    def listing(self) -> Listing:
        if self.classes:
            raise ValueError(f"classes picks class folders, and {self.path} has none: leave it out")
        parts = {part: _read_pickle(self.path / f"{part}.pkl") for part in self.parts}
        numbers = sorted({*parts["train"][1]})
        if others := sorted({*parts["test"][1]}.difference(numbers)):
            raise ValueError(f"{self.path}/test.pkl has label {others[0]}, which train.pkl has not")
        items = [(part, n) for part, (images, _) in parts.items() for n in range(len(images))]
        places = {number: place for place, number in enumerate(numbers)}

        def read(i: int) -> tuple[Image.Image, int]:
            images, labels = parts[items[i][0]]
            return Image.fromarray(images[items[i][1]]), places[labels[items[i][1]]]

        return Listing(
            tuple(map(str, numbers)),
            [f"image {n} of {part}.pkl" for part, n in items],
            [split_by_name(part, set(parts), str(n)) for part, n in items],
            read,
        )


class _Arrays(pickle.Unpickler):
    """What a pickle may hold here: arrays and plain values. Nothing else of it is ever called."""

    def find_class(self, module: str, name: str) -> Any:
        match module.replace("numpy._core", "numpy.core"), name:
            case ("numpy", "ndarray" | "dtype") | ("_codecs", "encode"):
                return super().find_class(module, name)
            case ("numpy.core.multiarray", "_reconstruct") | ("numpy.core.numeric", "_frombuffer"):
                return super().find_class(module.replace("numpy.core", "numpy._core"), name)
            case ("numpy.core.multiarray", "scalar"):
                return lambda kind, content: np.frombuffer(content, kind)[0]
        raise ValueError(f"it wants {module}.{name} to be run")


def _read_pickle(path: Path) -> tuple[np.ndarray, list[int]]:
    """Images (N, height, width, 3) and labels of a file of mini-ImageNet."""
    try:
        with path.open("rb") as file:
            content = _Arrays(file, encoding="latin1").load()  # as Python 2 wrote arrays
        images, labels = np.asarray(content["images"]), np.asarray(content["labels"]).tolist()
        shape = (len(labels), *images.shape[1:3], 3)
        if images.dtype != np.uint8 or images.shape != shape or {*map(type, labels)} != {int}:
            raise ValueError(
                f"its images are {images.dtype} {images.shape}, of {len(labels)} labels"
            )
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(
            f"{path} cannot be read ({error}): it should be a pickled dict of images, uint8 (N, "
            f"height, width, 3), and labels, N whole numbers; or use class folders of JPEGs"
        ) from error
    return images, labels


class Photos(Source):
    """The photographs inside two dependencies."""

    def members(self) -> list[Member]:
        rules = (photos.COUNTS, photos.STRIPS, photos.SIDES)
        files = [(str(path), *read_stamp(path)) for path in photos.paths().values()]
        return [*files, (repr(rules), 0, 0)]

    def watch(self, members: list[Member]) -> list[str]:
        return [str(path) for path in (self.path, *photos.paths().values())]

    def listing(self) -> Listing:
        whole = {photo: Image.open(path).convert("RGB") for photo, path in photos.paths().items()}
        crops, classes = photos.crops(), tuple(photos.FILES)
        return Listing(
            classes,
            [f"crop {crop.box} of {crop.photo}" for crop in crops],
            [crop.split for crop in crops],
            lambda i: (whole[crops[i].photo].crop(crops[i].box), classes.index(crops[i].photo)),
        )


class Torchvision(Source):
    """A data set that torchvision downloads and parses, in a folder of its own: data/<name>/."""

    def __init__(self, name: str, data: Path, download: bool) -> None:
        super().__init__(data / name.partition("-")[0], name)
        self.download = download

    def listing(self) -> Listing:
        from torchvision import datasets  # a second to import, and a cached set does without

        kind, parts = TORCHVISION[self.name]
        try:
            sets = {
                part: getattr(datasets, kind)(self.path, download=self.download, **arguments)
                for part, arguments in parts.items()
            }
        except (OSError, RuntimeError) as error:  # torchvision raises RuntimeError for "not found"
            why = "could not be downloaded" if self.download else "may not be with download=False"
            raise FileNotFoundError(
                f"{self.name} is not complete in {self.path} and {why} ({error}): put there what "
                f"torchvision.datasets.{kind}(root) reads, or use 'photos', which needs no network"
            ) from error
        items = [(part, n) for part, images in sets.items() for n in range(len(images))]
        first = next(iter(sets.values()))
        names = getattr(first, "classes", None) or getattr(first, "categories", None)  # Caltech101

        def read(i: int) -> tuple[Image.Image, int]:
            part, n = items[i]
            image, label = sets[part][n]
            return image, int(label)

        return Listing(
            tuple(names or "0123456789"),  # SVHN's digits have no names
            [f"image {n} of {self.name}'s {part} part" for part, n in items],
            [split_by_name(part, set(parts), str(n)) for part, n in items],
            read,
        )


def find_source(
    source: str | Path, data: Path, download: bool, classes: tuple[str, ...] = ()
) -> Source:
    """The source that a name or a path stands for, or of its class folders `classes` alone.

    FileNotFoundError where there is none, ValueError where it has no class folders.
    """
    if not str(source).strip():  # else the folder at hand: a shell's variable may be empty
        raise FileNotFoundError("its name is empty: name a data set, or give a path")
    if source == "starter":
        return Source(STARTER / "images", source, classes)
    if classes and source in NAMES:
        raise ValueError(f"classes picks class folders, and {source!r} has none: leave classes out")
    if source == "photos":
        return Photos(Path(photos.__file__), "photos")
    if isinstance(source, str) and source in TORCHVISION:
        return Torchvision(source, data, download)
    places = [Path(os.path.expanduser(source)).absolute(), data / source]
    for path in places:
        if os.path.isdir(path) or os.path.isfile(path):  # a pipe or device might never end
            kind, name = (Source, path.resolve().name) if path.is_dir() else (Zip, path.stem)
            if all((path / f"{part}.pkl").is_file() for part in Pickles.parts):
                kind = Pickles
            return kind(path, name, classes)
    if page := FOLDERS.get(str(source)):
        raise FileNotFoundError(f"{source} is not in {places[1]}: put it there as {page} says")
    name, hint = str(source), "give the path of a folder or zip of images"
    if name.isdecimal():
        hint = "papermill -p reads 2024_01 as 202401: give such a name with -r"
    elif os.sep not in name and len(name) < 20:
        hint += f", or one of {', '.join(NAMES)}"
    raise FileNotFoundError(
        f"{name!r} is no known data set, and neither {places[0]} nor {places[1]} is there: {hint}"
    )


def read_classes(file: str | Path, data: Path) -> tuple[str, ...]:
    """The class folders that a text file names, one a line.

    It lies where its path says, or in the data folder, or is a list that ships here. Raises
    FileNotFoundError where there is none, ValueError where it names none, or one twice.
    """
    own = Path(os.path.expanduser(file)).absolute()
    places = [own, data / file, Path(__file__).parent / file]
    path = next((path for path in places if os.path.isfile(path)), None)
    if path is None:
        raise FileNotFoundError(
            f"classes={str(file)!r} is no list, and neither {places[0]} nor {places[1]} is a file: "
            f"give a text file that names class folders, one a line, or imagenet100.txt"
        )
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"classes: {path} is no UTF-8 ({error}): save it as such") from error
    classes = tuple(compose(line) for line in lines if line)
    if not classes:
        raise ValueError(f"classes: {path} is empty: name class folders in it, one a line")
    twice = [repr(name) for name, n in Counter(classes).items() if n > 1]
    if twice:
        names = list_some(twice, 240 - len(str(path)))
        raise ValueError(f"classes: {path} repeats {names}: name each once")
    return classes


def _refuse(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # of what is downloaded later
        raise ValueError(
            f"the folder {error.filename} cannot be read ({error.strerror}): change its rights, or "
            f"move it away"
        )


def _leads_up(path: Path) -> bool:
    """Whether it is a link to a folder that holds it, which would have no end."""
    return path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())
