"""Which files of a folder or zip are images, and of which split and class each one is."""

import hashlib
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import PurePosixPath

HEIF = find_spec("pillow_heif") is not None  # with which Pillow reads the photographs of iPhones
FORMATS = "apng avif bmp dib gif ico j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx mpo pbm pcx pgm png"
FORMATS += " pnm ppm qoi sgi tga tif tiff webp" + " heic heif" * HEIF
EXTENSIONS = [f".{name}" for name in FORMATS.split()]
# What systems and tools leave behind: hidden files, thumbnails, bins.
HIDDEN = re.compile(
    r"(^|/)(\.|(__MACOSX|@eaDir|#recycle|\$RECYCLE\.BIN|lost\+found)(/|$)|Thumbs\.db$)"
)
PARTS = {"train": "train", "val": "val", "test": "test"}  # a folder's name in small letters: split
PARTS |= {"training": "train", "validation": "val", "valid": "val", "testing": "test"}


def sha256(text: str, more: bytes = b"") -> str:
    """In hexadecimal; names of files that are no UTF-8 count by their bytes."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape") + more).hexdigest()


def list_some(words: list[str], room: int) -> str:
    """As many of the words as `room` characters (40 at least) hold, and how many more there are; of
    a first word that is longer, both ends."""
    room = max(room, 40)  # beside a long path less would be left
    ends = itertools.accumulate(len(word) + 2 for word in words)
    n = max(1, sum(end <= room for end in ends))
    text = ", ".join(words[:n])
    text = text if len(text) <= room else f"{text[: room // 2]} … {text[-room // 2 :]}"
    return text + f" and {len(words) - n:,} more" * (n < len(words))


def compose(name: str) -> str:
    """A name in the one form in which names are compared: macOS writes the é of some as two
    characters, and other systems as one."""
    return unicodedata.normalize("NFC", name)


def printable(text: str) -> str:
    """The text in one line, bytes that are no UTF-8 as \\udcff: what files and screens hold."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")


def split_by_name(part: str, parts: set[str], name: str) -> str:
    """The split of an item that its source has in `part` of its `parts` ("all": it has no parts).

    Where the source has no val (or no test) of its own, a hash of the name decides: adding a file
    moves no other, and every machine agrees.
    """
    bucket = int(sha256(f"idaa:{name}"), 16) % 10
    if bucket == 0 and part in ("all", "train") and "val" not in parts:
        return "val"
    if part == "all":
        return "test" if bucket == 1 else "train"
    return part


def arrange(
    where: str,
    members: list[str],
    classes: tuple[str, ...] = (),
    broken: Collection[str] = (),
) -> tuple[list[str], list[str], list[str], list[str]]:
    """The images among the members of a folder or zip, each one's split and class ("": none), and
    sentences that say what is left out or read in another way than its name says.

    Class folders may lie under train/, [val/,] test/, all of it in wrapping folders; what lies
    deeper belongs to its class folder. Without test/, val/ takes its place; without both, a hash of
    the names splits 80/10/10, without val/ alone 90/10. A folder's name ends in "/". With `classes`
    the class folders of these names are taken alone. broken: links among the members that lead
    nowhere.

    Raises ValueError where there is no image, a class folder is empty, only test/ has a class, one
    of `classes` is not there, or it is unclear what belongs where.
    """
    names = sorted((name for name in members if not HIDDEN.search(name)), key=compose)
    kinds = {n: PurePosixPath(n).suffix.lower() for n in names if not n.endswith("/")}
    images = [name for name in kinds if kinds[name] in EXTENSIONS]
    others = {name: kind for name, kind in kinds.items() if kind not in EXTENSIONS}
    notes = _count({n: "broken link" if n in broken else kind for n, kind in others.items()})
    if not images:
        looked = f"looked for .jpg, .png and {len(EXTENSIONS) - 2} more extensions"
        raise ValueError("; ".join([f"{where} holds no image: {looked}", *notes]))

    filled = {str(folder) for name in kinds for folder in PurePosixPath(name).parents}
    empty = [name for name in names if name.endswith("/") and name[:-1] not in filled]
    folders = {name: compose(name).split("/")[:-1] for name in images + empty}
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
            what = "/".join([*folders[beside[0]][:1], ""]) or "it"
            raise ValueError(
                f"{where} has {beside[0]!r} beside train/, in no split: move {what} away (or "
                f"rename train/, if it is a class)"
            )
        parts, splits = {}, set()  # a class of that name among others
    if splits == {"train", "val"}:
        parts = {folder: part.replace("val", "test") for folder, part in parts.items()}
        splits = set(parts.values())
        notes.append(
            "there is no test/, so val/ is the test split, and a tenth of train/ is held out to "
            "validate with"
        )

    part_of = {name: parts[f[0]] if len(splits) > 1 else "all" for name, f in folders.items()}
    label_of = {name: "".join(f[bool(parts) :][:1]) for name, f in folders.items()}
    if depth and not any(label_of.values()):
        around = above[0][depth - 1]
        notes.append(
            f"no image has a class, since {printable(around)}/ around all of them is not taken for "
            f"one: if it is, make it train/{printable(around)}/"
        )
    if classes:
        there = {label for label in label_of.values() if label}
        if missing := [repr(name) for name in classes if name not in there]:
            raise ValueError(
                f"{where} has no class folder {list_some(missing, 280 - 2 * len(where))}, which "
                f"classes names: add what is missing, or correct the list"
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
        part = f"{folders[name][0]}/" if parts else ""
        if label and not {("train", label), ("all", label)} & holding:
            raise ValueError(
                f"{where} has class {label!r} in {part} but not in train/: add it there, or move "
                f"{part}{label}/ away (all of {part}, if the classes of its images are unknown)"
            )
        if name not in empty and not label and any(label_of.values()):
            if any(part_of[other] == part_of[name] and label_of[other] for other in images):
                raise ValueError(
                    f"{name!r} of {where} lies beside class folders: move it into one, or away if "
                    f"its class is unknown"
                )
            raise ValueError(
                f"{where} has no class folders in {part}, as {name!r} shows, and has them "
                f"elsewhere: move {part} away, or its images into class folders"
            )
    inner = {name: "/".join(compose(name).split("/")[depth + bool(parts) :]) for name in images}
    split_of = [split_by_name(part_of[name], splits, inner[name]) for name in images]
    return images, split_of, [label_of[name] for name in images], notes


def _count(kinds: dict[str, str]) -> list[str]:
    """A sentence that counts files that are no images, by extension, if there are any."""
    if not kinds:
        return []
    counts = Counter(kind or "without extension" for kind in kinds.values())
    text = ", ".join(f"{n} {printable(kind)}" for kind, n in sorted(counts.items()))
    if {".heic", ".heif"} & counts.keys():
        text += "; pip install pillow-heif, and .heic is read"
    if "" in kinds.values():
        text += "; give images an extension, such as .jpg"
    return [f"files that are not read as images: {text}"]
