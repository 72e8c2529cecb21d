"""Which files of a folder or zip are images, and of which split and class each one is."""

import hashlib
import posixpath
import re
import warnings
from collections import Counter, defaultdict
from itertools import takewhile
from pathlib import PurePosixPath

FORMATS = "avif bmp gif jfif jpe jpeg jpg pgm png ppm tif tiff webp"
EXTENSIONS = [f".{name}" for name in FORMATS.split()]
# What systems and tools leave behind: hidden files, thumbnails, bins.
HIDDEN = re.compile(r"(^|/)(\.|(__MACOSX|@eaDir|#recycle|\$RECYCLE\.BIN)(/|$)|Thumbs\.db$)")
PARTS = {"train": "train", "val": "val", "test": "test"}  # a folder's name in small letters: split
PARTS |= {"training": "train", "validation": "val", "valid": "val", "testing": "test"}


def split_by_name(part: str, parts: set[str], name: str) -> str:
    """The split of an item that its source has in `part` of its `parts` ("all": it has no parts).

    Where the source has no val (or no test) of its own, a hash of the name decides: adding a file
    moves no other, and every machine agrees.
    """
    bucket = int(hashlib.sha256(f"idaa:{name}".encode()).hexdigest(), 16) % 10
    if bucket == 0 and part in ("all", "train") and "val" not in parts:
        return "val"
    if part == "all":
        return "test" if bucket == 1 else "train"
    return part


def arrange(where: str, members: list[str]) -> tuple[list[str], list[str], list[str]]:
    """The images among the members of a folder or zip, and each one's split and class ("": none).

    Class folders may lie under train/, [val/,] test/, all of it in wrapping folders; what lies
    deeper belongs to its class folder. Files that are no images are counted in a warning. A
    member's name ends in "/" where it is a folder.

    Raises ValueError where there is no image, a class folder is empty, only test/ has a class, or
    it is unclear what belongs where.
    """
    names = sorted(name for name in members if not HIDDEN.search(name))
    kinds = {n: PurePosixPath(n).suffix.lower() for n in names if not n.endswith("/")}
    images = [name for name in kinds if kinds[name] in EXTENSIONS]
    if not images:
        raise ValueError(f"{where} holds no image: looked for {', '.join(EXTENSIONS)}")
    others = Counter(
        kind or "without extension" for kind in kinds.values() if kind not in EXTENSIONS
    )
    if others:
        counts = ", ".join(f"{n} {kind}" for kind, n in sorted(others.items()))
        warnings.warn(f"{where} has files that are not read as images: {counts}", stacklevel=2)

    folders = {PurePosixPath(name).parent for name in kinds}
    filled = {f"{path}/" for folder in folders for path in (folder, *folder.parents)}
    entries = images + [name for name in names if name.endswith("/") and name not in filled]
    common = posixpath.commonpath([name.rstrip("/").rpartition("/")[0] for name in entries])
    wrapping = takewhile(lambda f: f and f.lower() not in PARTS, common.split("/"))
    top = "".join(f"{folder}/" for folder in wrapping)
    places = {name: name.removeprefix(top) for name in entries}
    first = {name: place.split("/")[0] for name, place in places.items()}
    parts = {folder: PARTS[folder.lower()] for folder in first.values() if folder.lower() in PARTS}
    splits, beside = set(parts.values()), [name for name in entries if first[name] not in parts]
    if parts and "train" not in splits:
        raise ValueError(f"{where} has {min(parts)}/ but no train/: add train/, or rename it")
    if parts and beside:
        deeper = (name for name in entries if first[name] in parts and places[name].count("/") > 1)
        if splits != {"train"} or any(deeper):
            raise ValueError(f"{where} has {beside[0]!r} beside train/: move it inside, or away")
        parts, splits = {}, set()  # a class of that name among others

    labels, holding = {}, defaultdict(set)
    for name, place in places.items():
        part = "all"
        if parts:
            _, _, places[name] = place.partition("/")
            part = parts[first[name]] if len(splits) > 1 else part
        label = places[name].rpartition("/")[0].split("/")[0]
        labels[name] = part, label
        if name in kinds:
            holding[part].add(label)
    trained = holding["train"] | holding["all"]
    labelled = any(set().union(*holding.values()))
    for name, (part, label) in labels.items():
        if label and label not in holding[part]:
            raise ValueError(f"class folder {name!r} of {where} holds no image: fill or remove it")
        if label and label not in trained:
            raise ValueError(f"{where} has class {label!r} in {part}/ but not in train/: add it")
        if labelled and not label and name in kinds:
            raise ValueError(
                f"{name!r} of {where} lies beside class folders: move it into one, or away if its "
                f"class is unknown"
            )
    return (
        images,
        [split_by_name(labels[name][0], splits, places[name]) for name in images],
        [labels[name][1] for name in images],
    )
