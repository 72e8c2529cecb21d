"""Does whatever is sent end in one clear sentence? Configurations, grids, images, checkpoints.

    python benchmarks/hostile.py          # all of it, and the result file; some minutes

What comes is accepted, or refused by a `UserError` of one line and at most 400 characters within 20
seconds. All else is unclear: another exception, a longer sentence, a hang. Everything is drawn from
one seed. Nothing outside a temporary folder is touched, and memory is limited to 12 GiB.
"""

from __future__ import annotations

import collections
import contextlib
import io
import os
import random
import resource
import signal
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import record
import torch
from PIL import Image

from idaa_lib import grids, plans
from idaa_lib.configs import (
    SSLConfig,
    UserError,
    VAEConfig,
)
from idaa_lib.evaluate.stage import evaluate
from idaa_lib.evaluate.transfer import transfer
from idaa_lib.identity import study
from idaa_lib.interop import load_official
from idaa_lib.interop.layouts import LAYOUTS, rename
from idaa_lib.nets import build_backbone
from idaa_lib.nets.heads import Network, mlp
from idaa_lib.nets.vae import VAE
from idaa_lib.runs import CONFIGS
from idaa_lib.runs.machine import open_images
from idaa_lib.train import train

LENGTH, SECONDS, MEMORY = 400, 20, 12 * 2**30
PROTOCOL = f"""Seed 0. Unclear: another exception than a UserError, a text of several lines or of
more than {LENGTH} characters, or more than {SECONDS} s. Configurations: of a random stage, one to
three of its fields or knobs with values of a pool (numbers to 10^400, text to 100,000 characters,
deep JSON, lone surrogates, other types, sound ones); trainings, evaluation, transfer and the
identity study are started with it up to their first step. Grids: such values crossed with others,
and what is no grid's, read and looked through as before a sweep; each refusal counts. Images:
Pillow's formats cut, overwritten or with other sizes in their heads, pipes, devices, links,
folders; each is one of a folder of four, and is left out by on_error='skip'. Checkpoints: published
layouts cut, overwritten, with other tensors, NaN or code inside, pipes, devices, packed zeros; code
that ran counts as unclear."""
Tried = tuple[int, list[str]]  # how many, and a line for each that was unclear


class Begun(UserError):
    """It was accepted, and work would begin now."""


def judge(action: Callable[[], Any]) -> tuple[bool, str]:
    """Whether what comes was accepted, and what is unclear of its end ("": nothing)."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"it took more than {SECONDS} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            action()
        return True, ""
    except Begun:
        return True, ""
    except UserError as error:
        text = str(error)
        return False, "" if len(text) <= LENGTH and "\n" not in text else f"long: {text[:500]}"
    except Exception as error:
        return False, f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


# --- configurations ------------------------------------------------------------------------------

DEEP = ["[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, '{"a":' * 300 + "[]" + "}" * 300]
NESTED: Any = []
for _ in range(2000):
    NESTED = [NESTED]
TEXTS = [
    "",
    " ",
    "None",
    "null",
    "true",
    "-1",
    "0",
    "nan",
    "-inf",
    "1e9999999999",
    "1e400",
    "8/255",
    "1/0",
]
TEXTS += [
    "9" * 5000,
    "1" * 4000 + "/3",
    "\ud800",
    "a\udcffb",
    "a\0b",
    "a\nb",
    "~nosuchuser/x",
    "~",
    "/",
    "..",
    "٣",
]
TEXTS += [
    "/dev/zero",
    "/proc/self/mem",
    "/root",
    "x" * 300,
    "x" * 100_000,
    "a b " * 300,
    "a/" * 400,
    "a/" * 5000,
]
TEXTS += [
    "0.1, many",
    "[1, 2",
    "{'a': 1}",
    "a=1",
    "a=1, b",
    "=",
    ",",
    "__import__('os')",
    "${HOME}",
    *DEEP,
]
OTHERS: list[Any] = [
    True,
    False,
    None,
    [],
    (),
    {},
    [[]],
    {"a": []},
    {1: 2},
    {"\ud800": 1},
    b"a",
    3j,
    set(),
    object,
]
OTHERS += [
    [10**39],
    ["1e400"],
    [None],
    [True],
    range(3),
    NESTED,
    {"a": NESTED},
    Path("x"),
    np.float32(1),
    float,
]
OTHERS += [
    {"mean": NESTED},
    {"preset": 1},
    {"epochs": [10**400]},
    [float("nan")],
    ["x" * 5000],
    (1, "2", 3.0),
]
NUMBERS = [
    0,
    1,
    2,
    3,
    5,
    -1,
    7.5,
    1e-300,
    1e30,
    1e38,
    1e39,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
]
NUMBERS += [10**6, 10**9, 10**10, 2**31, 2**63, 2**64, 10**20, 10**29, 10**39, 10**400, -(10**39)]
TINY: dict[str, Any] = {
    "dataset": "photos",
    "limit": 64,
    "batch_size": 16,
    "epochs": 1,
    "width": 4,
    "device": "cpu",
}
STARTS: dict[str, Callable[[Any], Any]] = dict.fromkeys(("vae", "ssl", "semi"), train)
STARTS |= {"eval": evaluate, "transfer": transfer, "theory": study}
WORK = ["train.loop.Fit.run", "evaluate.stage.perform", "evaluate.transfer.perform"]
WORK = [f"idaa_lib.{name}" for name in (*WORK, "identity.stage.perform")]


def draw_configuration(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A stage and values for some of its names."""
    stage = draw.choice([*CONFIGS])
    config, values = CONFIGS[stage], dict[str, Any]()
    for choice in config.choices:
        values[choice] = draw.choice([*config.list_kinds(choice)])
    options = [config.list_kinds(choice)[values[choice]].Options for choice in config.choices]
    names = [name for model in (config, *options) for name in model.model_fields]
    for name in draw.sample(names, draw.choice((1, 1, 1, 2, 3))):
        values[name] = draw.choice(draw.choice((TEXTS, OTHERS, NUMBERS)))
    if draw.random() < 0.05:
        values[draw.choice(("epsilom", "x" * 5000, "\ud800", "eps", "__class__"))] = 1
    return stage, values


def try_configurations(n: int, seed: int = 0) -> Tried:
    """n drawn configurations, started until their work would begin."""
    draw, unclear, n_accepted = random.Random(seed), [], 0
    tiny = {"vae": train(VAEConfig(**TINY)).id, "run": train(SSLConfig(**TINY)).id}
    fixed: dict[str, dict[str, Any]] = dict.fromkeys(("vae", "ssl", "semi"), TINY)
    fixed |= {stage: {"run": tiny["run"], "limit": 64} for stage in ("eval", "transfer")}
    fixed["theory"] = tiny | {"limit": 64}
    with contextlib.ExitStack() as stack:
        for name in WORK:
            stack.enter_context(mock.patch(name, side_effect=Begun("accepted")))
        for _ in range(n):
            stage, values = draw_configuration(draw)

            def start(stage: str = stage, values: dict[str, Any] = values) -> None:
                config = CONFIGS[stage](**fixed.get(stage, {}) | values)
                repr(config), config.identity(), config.model_dump_json()
                STARTS.get(stage, id)(config)

            accepted, why = judge(start)
            n_accepted += accepted
            if why:
                short = {name: repr(v)[:60] for name, v in values.items() if v is not NESTED}
                unclear.append(f"{stage} {short}: {why}")
    print(f"{n} configurations, {n_accepted} accepted, {len(unclear)} unclear")
    return n, unclear


def draw_grid(draw: random.Random) -> dict[str, Any]:
    """A grid of two points or more: values for some names of a stage, and what is no grid's."""
    stage, values = draw_configuration(draw)
    stage = stage if stage in grids.STAGES else "all"
    pool = [*TEXTS, *OTHERS, *NUMBERS]
    grid: dict[str, Any] = {"stages": [stage] if stage == "vae" else ["vae", "ssl", "eval"]}
    grid["fixed"] = {"all": {k: v for k, v in TINY.items() if k not in values}}
    grid["cross"] = {stage: {name: [value, draw.choice(pool)] for name, value in values.items()}}
    if draw.random() < 0.2:
        grid["cross"]["x"] = [draw.choice(pool), {stage: values, "labels": draw.choice(pool)}]
    if draw.random() < 0.3:
        place = draw.choice((grid, grid["fixed"], grid["cross"]))
        place[draw.choice((*grids.Grid.model_fields, *grids.STAGES, "x"))] = draw.choice(pool)
    return grid


def try_grids(n: int, seed: int = 0) -> Tried:
    """n drawn grids, read and looked through as before a sweep: all refusals are clear too."""
    draw, unclear, n_accepted = random.Random(seed), list[str](), 0
    for _ in range(n):
        grid = draw_grid(draw)

        def look(grid: dict[str, Any] = grid) -> None:
            points, reasons = plans._try_chains(grids.read(grid).points())
            tasks = {key: task for _, chain in points for key, task in chain.items()}
            for reason in [*reasons, *plans._find_refusals(tasks).values()]:
                if len(reason) > LENGTH or "\n" in reason:
                    raise UserError(reason)

        accepted, why = judge(look)
        n_accepted += accepted
        if why:
            unclear.append(f"grid {repr(grid)[:300]}: {why}")
    print(f"{n} grids, {n_accepted} accepted, {len(unclear)} unclear")
    return n, unclear


# --- images --------------------------------------------------------------------------------------

FORMATS = {
    "png": "RGB",
    "jpg": "RGB",
    "bmp": "RGB",
    "gif": "P",
    "tif": "RGB",
    "webp": "RGB",
    "ppm": "RGB",
    "jpeg": "L",
}


def damage(content: bytes, draw: random.Random) -> bytes:
    """The content cut, overwritten, longer, or with a part that is another's."""
    changed, at = bytearray(content), draw.randrange(len(content))
    match draw.randrange(6):
        case 0:
            return content[:at]
        case 1:
            changed[at : at + 8] = draw.randbytes(draw.choice((0, 1, 8, 100)))
        case 2:  # in the head, where sides and offsets are
            at = draw.randrange(min(64, len(content)))
            changed[at : at + 4] = draw.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
        case 3:
            changed[at:] = bytes(len(content) - at)
        case 4:
            return content[at:] + content[:at]
        case _:
            for _ in range(20):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def special_files(folder: Path, name: str) -> Iterator[Path]:
    """One after another under this name: what is no regular file, or none that could be held."""
    path = folder / name
    targets = ("/dev/zero", "/dev/urandom", "/proc/self/mem", "nowhere", name, "/root", ".")
    makers: list[Callable[[], object]] = [lambda: os.mkfifo(path), path.mkdir, path.touch]
    makers += [lambda target=target: path.symlink_to(target) for target in targets]  # type: ignore[misc]
    makers.append(lambda: path.open("wb").truncate(2**40))  # takes no room
    makers.append(lambda: path.write_text("<html>Not found</html>", "utf-8"))
    for make in makers:
        with contextlib.suppress(OSError):
            make()
            yield path
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def try_images(n: int, root: Path, seed: int = 0) -> Tried:
    """n damaged images, each beside three sound ones; and what is no image file."""
    draw, unclear = random.Random(seed), list[str]()
    noise = np.random.default_rng(seed)
    folder = root / "images"
    folder.mkdir()
    sound = {}
    for ending, mode in FORMATS.items():
        buffer = io.BytesIO()
        picture = Image.fromarray(noise.integers(0, 256, (24, 24, 3), np.uint8)).convert(mode)
        picture.save(buffer, Image.registered_extensions()[f".{ending}"])
        sound[ending] = buffer.getvalue()
    for place in range(3):
        (folder / f"sound{place}.png").write_bytes(sound["png"])

    def look(path: Path, what: str) -> None:
        accepted, why = judge(lambda: open_images(str(folder), "train", 8, None).images)
        if not accepted and not why and not path.is_dir():
            skips, why = judge(lambda: open_images(str(folder), "train", 8, None, on_error="skip"))
            why = "" if skips else f"skip: {why}"
        if why:
            unclear.append(f"{what}: {why}")

    special = 0
    for ending in FORMATS:
        for path in special_files(folder, f"a.{ending}"):
            look(path, f"special {path.name} {os.path.realpath(path)}")
            special += 1
    for tried in range(special, n):
        ending = draw.choice([*FORMATS])
        name = draw.choice(("x", "y\udcff", "z" * 200)) + f"{tried}.{draw.choice((ending, 'png'))}"
        path = folder / name
        path.write_bytes(damage(sound[ending], draw))
        look(path, f"{ending} {tried}")
        path.unlink()
    print(f"{n} damaged images, {len(unclear)} unclear")
    return n, unclear


# --- checkpoints ---------------------------------------------------------------------------------


class Harm:
    """Leaves a file where it is unpickled as code."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.reduced = call, arguments

    def __reduce__(self) -> Any:
        return self.reduced


def make_published(seed: int) -> dict[str, dict[str, Any]]:
    """State dicts by kind, as the projects name them."""
    torch.manual_seed(seed)
    states: dict[str, dict[str, Any]] = {"vae": dict(VAE(6, 32, 8).state_dict())}
    backbone = build_backbone("resnet18", width=4, stem="cifar", adversarial_norms=False)
    d = backbone.feature_dim
    for mark, projector in (
        ("projector.", mlp(d, d, 8, norm=False)),
        ("g.", mlp(d, 16, 8, bias=False)),
    ):
        names = LAYOUTS[mark].names
        state = Network(backbone, projector=projector).state_dict()
        states[mark] = {rename(key, names): value.clone() for key, value in state.items()}
    return states


def change(state: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The state with one tensor that is another, missing, or no tensor."""
    key = draw.choice([*state])
    tensor = state[key]
    value = draw.choice(
        [
            torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else None,
            torch.full_like(tensor, -float("inf")) if tensor.is_floating_point() else None,
            tensor.flatten()[:0],
            torch.tensor(1.0),
            torch.ones(()).expand(10**6, 10**6),
            torch.ones(1).expand(tensor.shape) if tensor.dim() else torch.ones(3),
            tensor[None],
            tensor.to(torch.complex64),
            tensor.to(torch.bool),
            tensor.to(torch.int8),
            tensor.to_sparse() if tensor.dim() else torch.ones(2, 2).to_sparse(),
            torch.empty_like(tensor, device="meta"),
            torch.empty(2**40, device="meta"),
            torch.quantize_per_tensor(torch.ones(tensor.shape), 0.1, 0, torch.qint8),
            tensor.tolist(),
            "text",
            {"a": tensor},
            {},
            torch.nn.Parameter(tensor.float()),
        ]
    )
    changed = {**state, key: value}
    match draw.randrange(5):
        case 0:
            del changed[key]
        case 1:
            changed = {**state, key + draw.choice((".extra", "\udcff", "x" * 5000)): value}
        case 2:
            changed = {**state, draw.choice([3, None, ("a", 1)]): value}  # type: ignore[dict-item]
    return changed


def wrap(state: dict[str, Any], draw: random.Random, harm: Path) -> Any:
    """The state as others wrap it, with what is no part of it beside."""
    code = Harm(draw.choice((os.mkdir, os.system, eval, print)), str(harm))
    values: list[Any] = [
        None,
        -1,
        float("nan"),
        10**400,
        "x" * 5000,
        torch.ones(7),
        torch.ones(()),
        [],
        {},
        code,
    ]
    trainer = draw.choice(
        [*values, {"iteration": draw.choice(values), "epoch_length": draw.choice(values)}]
    )
    itself: dict[str, Any] = {}
    itself["state_dict"] = itself
    return draw.choice(
        [
            state,
            {f"module.{key}": value for key, value in state.items()},
            {"net": state, "acc": draw.choice(values), "epoch": draw.choice(values)},
            {"state_dict": {"model": state}, "optimizer": code},
            {"backbone": state, "trainer": trainer, "projector": state},
            {"backbone": state, "projector": draw.choice(values)},
            itself,
            [state],
            code,
        ]
    )


def try_checkpoints(n: int, root: Path, seed: int = 0) -> Tried:
    """n files that are no sound checkpoint, or may be none."""
    draw, unclear, states = random.Random(seed), list[str](), make_published(seed)
    folder, harm = root / "checkpoints", root / "harm"
    folder.mkdir()

    def look(path: Path, what: str) -> None:
        _, why = judge(lambda: load_official(path))
        if harm.exists():
            why = "its code ran"
            harm.rmdir()
        if why:
            unclear.append(f"{what}: {why}")

    special = 1
    for path in special_files(folder, "a.pth"):
        look(path, f"special {os.path.realpath(path)}")
        special += 1
    with zipfile.ZipFile(folder / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(2**26))
    look(folder / "bomb.pth", "packed zeros")
    for tried in range(special, n):
        kind = draw.choice([*states])
        state, way = states[kind], draw.choice(("tensors", "bytes", "wrapped"))
        if way == "tensors":
            for _ in range(draw.choice((1, 1, 2, 40))):
                state = (
                    change(states[kind], draw)
                    if state is states[kind]
                    else state | change(states[kind], draw)
                )
        content: Any = wrap(state, draw, harm) if way == "wrapped" else state
        buffer = io.BytesIO()
        try:
            torch.save(content, buffer, _use_new_zipfile_serialization=draw.random() < 0.5)
        except Exception:  # what cannot be written is tried in the other format
            buffer = io.BytesIO()
            torch.save(content, buffer)
        body = buffer.getvalue()
        path = folder / f"{tried}.pth"
        path.write_bytes(damage(body, draw) if way == "bytes" else body)
        look(path, f"{way} {kind} {tried}")
        path.unlink()
    print(f"{n} checkpoints, {len(unclear)} unclear")
    return n, unclear


def main() -> str:
    """Where the result file was written."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["IDAA_DATA"], os.environ["IDAA_OUTPUTS"] = f"{root}/data", f"{root}/outputs"
        for name, (tried, unclear) in (
            ("bad_configurations", try_configurations(2500)),
            ("bad_grids", try_grids(2500)),
            ("damaged_files", try_images(600, root)),
            ("hostile_checkpoints", try_checkpoints(400, root)),
        ):
            for line, count in collections.Counter(unclear).items():
                print(f"  {count} × {line!a}")
            rows.append(
                record.row(
                    f"{name}_tried",
                    tried,
                    name.removeprefix("bad_") if name.startswith("bad_") else "files",
                    tried,
                )
            )
            rows.append(record.row(f"{name}_unclear", len(unclear), rows[-1]["unit"], tried))
    return str(record.write("hostile", " ".join(PROTOCOL.split()), rows))


if __name__ == "__main__":
    print(main())
    sys.exit()
