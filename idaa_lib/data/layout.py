"""Which files of a folder or zip are images, and of which split and class each one is."""

import hashlib
import re
import warnings
from collections import Counter
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


def arrange(
    where: str, members: list[str], classes: tuple[str, ...] = ()
) -> tuple[list[str], list[str], list[str]]:
    """The images among the members of a folder or zip, and each one's split and class ("": none).

    Class folders may lie under train/, [val/,] test/, all of it in wrapping folders; what lies
    deeper belongs to its class folder. Without test/, a hash of the names splits 80/10/10, without
    val/ alone 90/10. Other files are counted in a warning. A folder's name ends in "/". With
    `classes` the class folders of these names are taken alone.

    Raises ValueError where there is no image, a class folder is empty, only test/ has a class, one
    of `classes` is not there, or it is unclear what belongs where.
    """
    names = sorted(name for name in members if not HIDDEN.search(name))
    kinds = {n: PurePosixPath(n).suffix.lower() for n in names if not n.endswith("/")}
    images = [name for name in kinds if kinds[name] in EXTENSIONS]
    if not images:
        raise ValueError(f"{where} holds no image: looked for {', '.join(EXTENSIONS)}")
    others = [kind or "without extension" for kind in kinds.values() if kind not in EXTENSIONS]
    if others:
        counts = ", ".join(f"{n} {kind}" for kind, n in sorted(Counter(others).items()))
        warnings.warn(f"{where} has files that are not read as images: {counts}", stacklevel=2)

    filled = {str(folder) for name in kinds for folder in PurePosixPath(name).parents}
    empty = [name for name in names if name.endswith("/") and name[:-1] not in filled]
    folders = {name: name.split("/")[:-1] for name in images + empty}
    above = [f[:-1] if name in empty else f for name, f in folders.items()]
    depth = 0  # of the folders that hold everything, which are no classes
    for level in zip(*above, strict=False):
        if len(set(level)) > 1 or level[0].lower() in PARTS or level[0] in classes:
            break
        depth += 1
    folders = {name: f[depth:] for name, f in folders.items()}
    parts = {f[0]: PARTS[f[0].lower()] for f in folders.values() if f and f[0].lower() in PARTS}
    splits = set(parts.values())
    if parts and "train" not in splits:
        raise ValueError(f"{where} has {min(parts)}/ but no train/: add train/, or rename it")
    beside = [name for name, f in folders.items() if not f or f[0] not in parts]
    if parts and beside:
        if splits != {"train"} or any(len(f) > 1 and f[0] in parts for f in folders.values()):
            raise ValueError(f"{where} has {beside[0]!r} beside train/: move it inside, or away")
        parts, splits = {}, set()  # a class of that name among others

    part_of = {name: parts[f[0]] if len(splits) > 1 else "all" for name, f in folders.items()}
    label_of = {name: "".join(f[bool(parts) :][:1]) for name, f in folders.items()}
    if classes:
        there = {label for label in label_of.values() if label}
        if missing := [repr(name) for name in classes if name not in there]:
            raise ValueError(
                f"{where} has no class folder {', '.join(missing)}, which classes names: add what "
                f"is missing, or correct the list"
                if there
                else f"{where} has no class folders, of which classes picks: leave classes out"
            )
        wanted = set(classes)  # a tuple of a thousand names would be searched a million times
        label_of = {name: label for name, label in label_of.items() if label in wanted}
        images = [name for name in images if name in label_of]
    holding = {(part_of[name], label_of[name]) for name in images}
    for name, label in label_of.items():
        if label and (part_of[name], label) not in holding:
            raise ValueError(f"class folder {name!r} of {where} holds no image: fill or remove it")
        if label and not {("train", label), ("all", label)} & holding:
            raise ValueError(
                f"{where} has class {label!r} in {part_of[name]}/ but not in train/: add it"
            )
        if name not in empty and not label and any(label_of.values()):
            raise ValueError(
                f"{name!r} of {where} lies beside class folders: move it into one, or away if its "
                f"class is unknown"
            )
    inner = {name: "/".join(name.split("/")[depth + bool(parts) :]) for name in images}
    split_of = [split_by_name(part_of[name], splits, inner[name]) for name in images]
    return images, split_of, [label_of[name] for name in images]
