"""The benchmarks' own arithmetic: what is compared, and what counts as having moved."""

import importlib
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from PIL import Image
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import profile_step
import record
import sides
import speed

from idaa_lib import SSLConfig, plans, runs
from idaa_lib.nets import build_backbone
from idaa_lib.runs import checkpoints
from idaa_lib.runs import machine as environment


def file(*rows):
    return {"hardware": "h", "protocol": "p", "rows": list(rows)}


def row(what, value, unit="ms", spread=None):
    return {"what": what, "value": value, "unit": unit, "spread": spread}


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (
            "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n"
            "model name\t: AMD EPYC\n\nprocessor\t: 1\ncpu family\t: 26\n",
            "AMD EPYC (family 25, model 17), ",
        ),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", "aarch64, "),  # of an ARM, which tells no name
    ],
)
def test_hardware_tells_processors_of_one_name_apart(cpuinfo, name, monkeypatch):
    monkeypatch.setattr(environment.platform, "processor", lambda: "aarch64")
    monkeypatch.setattr(environment.Path, "exists", lambda path: True)
    monkeypatch.setattr(environment.Path, "read_text", lambda path, **options: cpuinfo)
    text = environment.hardware(torch.device("cpu"))
    assert text.startswith(name) and text.endswith(f" of {os.cpu_count()} cores")


@pytest.mark.parametrize(
    ("old", "new", "unit", "spread", "verdict"),
    [
        (10.0, 11.9, "ms", [9.0, 11.0], "same"),  # half widths 1 and 1
        (10.0, 12.1, "ms", [9.0, 11.0], "worse"),
        (10.0, 7.9, "ms", [9.0, 11.0], "better"),
        (3.0, 2.0, "ratio", [2.9, 3.1], "worse"),
        (3.0, 4.0, "ratio", [2.9, 3.1], "better"),
        (100.0, 109.0, "MiB", None, "same"),  # 5 % each
        (100.0, 111.0, "MiB", None, "worse"),
        (50.0, 60.0, "% top-1", 2.0, "better"),
    ],
)
def test_a_row_has_moved_beyond_both_spreads(old, new, unit, spread, verdict):
    moves = record.moves(
        file(row("a", old, unit, spread), row("gone", 1)),
        file(row("a", new, unit, spread), row("fresh", 1)),
    )
    assert moves == [("a", old, new, verdict)]


def test_less_is_better_of_idaa_over_simclr():
    old, new = (file(row("idaa_over_simclr", v, "ratio", [v, v])) for v in (1.9, 1.8))
    assert record.moves(old, new) == [("idaa_over_simclr", 1.9, 1.8, "better")]


def test_the_page_of_speed_has_the_newest_figure_of_each_machine():
    def file_of(hardware, *rows):
        about = {"name": "speed", "date": "d", "versions": {"python": "3.11", "torch": "2.14"}}
        return file(*rows) | about | {"hardware": hardware}

    def measurement(what, value, spread=None):
        return row(what, value, "ratio", spread) | {"n": 7}

    old = file_of("CPU", measurement("simclr_step_ratio", 2.0), measurement("idaa_step_ratio", 2.5))
    new = file_of("CPU", measurement("simclr_step_ratio", 2.25, [2.1, 2.3]))
    lines = record.table(
        {
            "2026-11-26-cpu-speed.json": old,
            "2026-11-27-cpu-speed.json": new,
            "2026-11-25-gpu-speed.json": file_of("GPU", measurement("startup_seconds", 8.0)),
        }
    ).split("\n")
    assert lines[0].endswith("| target | CPU | GPU |")
    (simclr,) = (line for line in lines if line.startswith("| SimCLR step"))
    assert simclr.endswith("| ≥ 2 | 2.25 × [2.1, 2.3], n = 7 | – |")
    (idaa,) = (line for line in lines if line.startswith("| SimCLR + IDAA step"))
    assert idaa.endswith("| ≥ 2.6 | 2.5 ×, n = 7 | – |")
    files = [line.count("../benchmarks/results/") for line in lines]
    assert (max(files), sum(files)) == (2, 3)


@pytest.mark.parametrize(
    "name", ["demo", "evidence", "hops", "methods", "precision", "slider", "starter"]
)
def test_a_benchmark_finds_what_it_uses(name):
    importlib.import_module(name)


def test_adversaries_are_compared_seed_by_seed():
    """Pairs differ by 1, 2 and 3 points, whatever the seeds do: 2 ± t(.975; 2) / √3. A seed that
    one of two lacks is in neither side of their difference."""
    import evidence

    scores = {"none": {0: 50.0, 1: 60.0, 2: 70.0}, "idaa": {0: 51.0, 1: 62.0, 2: 73.0}}
    rows = {r["what"]: r for r in evidence.summarise("knn", scores | {"clae": {2: 72.5}})}
    difference = rows["evidence_difference_idaa_none_knn"]
    assert (difference["value"], difference["n"]) == (2.0, 3)
    half = 4.302653 / 3**0.5
    assert difference["spread"] == pytest.approx([2 - half, 2 + half], abs=1e-3)
    assert rows["evidence_knn_idaa"]["value"] == 62.0
    figures = rows["evidence_difference_idaa_clae_knn"]
    assert (figures["value"], figures["n"], figures["spread"]) == (0.5, 1, None)


def test_the_evidence_differs_by_adversary_and_seed_alone():
    import evidence

    grid = evidence.grid()
    tasks = [task.config for task in plans.plan(grid).values()]
    assert {config.stage for config in tasks} == {"ssl", "eval"}  # the VAE is the starter's
    trainings = [config for config in tasks if config.stage == "ssl"]
    assert len(trainings) == len(evidence.ADVERSARIES) * len(evidence.SEEDS) == len(grid)
    names = {"adversary", "seed"}
    names |= {row["name"] for row in SSLConfig.fields() if row["of"] != "all"}
    configs = [{k: v for k, v in config if k not in names} for config in trainings]
    assert all(config == configs[0] for config in configs)


def test_simclr_alone_gets_the_seconds_of_idaa():
    """Its points are those without an adversary but for the epochs: as many as the step of IDAA,
    measured on processors, takes times that of SimCLR."""
    import evidence

    plain = [p for p in evidence.grid() if p.ssl["adversary"] == "none"]
    longer = [p.ssl | {"epochs": evidence.EPOCHS} for p in evidence.longer_grid()]
    assert longer == [p.ssl for p in plain]
    files = (Path(evidence.__file__).parent / "results").glob("*-of-2-cores-speed*.json")
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    ratios = [row["value"] for row in rows if row["what"] == "idaa_over_simclr"]
    assert ratios
    assert all(round(evidence.EPOCHS * ratio) == evidence.EQUAL_SECONDS for ratio in ratios)
    entries = [{"adversary": "none", "epochs": p.ssl["epochs"]} for p in evidence.longer_grid()]
    assert {evidence.name_training(e) for e in entries} == {"none_at_equal_seconds"}


def test_what_another_machine_finished_is_not_made_again(tmp_path, monkeypatch):
    """Of four points one is there; entries of another VAE and of other epochs are no points."""
    import evidence

    monkeypatch.setattr(evidence, "ENTRIES", tmp_path / "evidence.jsonl")
    monkeypatch.setattr(evidence, "DATASET", "photos")  # CIFAR-10 may not be here
    keys = [evidence.describe_point(point) for point in evidence.grid()[:4]]
    for about in (keys[0], keys[1] | {"vae": "0" * 12}, keys[2] | {"epochs": 1}):
        evidence.keep(about, {"kNN": 50.0, "linear": 60.0, "seconds": 9})
    assert [bool(evidence.find_entries(about)) for about in keys] == [True, False, False, False]


def test_the_vae_of_cifar10_is_compared_on_other_images(tmp_path, monkeypatch):
    """Differences are 4 points to no adversary on both seeds, and 1 and 3 to a VAE of the images;
    the digits of the second set are scikit-learn's, each once."""
    import evidence
    from sklearn.datasets import load_digits

    monkeypatch.setenv("IDAA_DATA", str(tmp_path))
    monkeypatch.setattr(evidence, "ENTRIES", tmp_path / "evidence.jsonl")
    grid = [point for point in evidence.other_grid() if point.ssl["seed"] < 2]
    keys = [evidence.describe_point(point) for point in grid]
    assert len({str(key) for key in keys}) == len(grid) == 2 * 2 * 3
    scores = {None: (50.0, 60.0), "own": (53.0, 61.0)}  # of two seeds; else the starter's VAE
    short = keys[0] | {"precision": "of which there is less"}
    evidence.keep(short, {"kNN": 99.0, "linear": 99.0, "seconds": 9})
    for about in keys:
        score = scores.get(about["vae"], (54.0, 64.0))[about["seed"]]
        evidence.keep(about, {"kNN": score, "linear": score, "seconds": 9})
    rows = {row["what"]: row for row in evidence.describe_other_images()}
    for name, metric in itertools.product(evidence.OTHER_IMAGES, ("knn", "linear")):
        start, end = "evidence_difference_cifar10_vae", f"{metric}_on_{name}"
        row = rows[f"{start}_no_adversary_{end}"]
        assert (row["value"], row["n"], row["spread"]) == (4.0, 2, [4.0, 4.0])
        assert rows[f"{start}_own_vae_{end}"]["value"] == 2.0

    digits, files = load_digits(), sorted((tmp_path / "digits").glob("*/*/*.png"))
    assert sorted(int(path.stem) for path in files) == [*range(len(digits.target))]
    assert all(int(path.parent.name) == digits.target[int(path.stem)] for path in files)
    assert {path.stem for path in files if "test" in path.parts} == {
        f"{i:04d}" for i in range(1437, 1797)
    }
    for path in files[:: len(files) // 20]:
        image = digits.images[int(path.stem)]
        assert np.abs(np.asarray(Image.open(path)) / 255 * 16 - image).max() < 0.04


def test_one_field_at_a_time_is_compared_with_no_adversary(tmp_path, monkeypatch):
    """Each training has another ε, β or dim than the middle, in one of the three at most. Both
    seeds of a place are 2 and 4 points above no adversary: 3 ± t(.975; 1)."""
    import evidence

    monkeypatch.setattr(evidence, "ENTRIES", tmp_path / "evidence.jsonl")
    monkeypatch.setattr(evidence, "DATASET", "photos")  # CIFAR-10 may not be here
    monkeypatch.setattr(evidence, "SMALLER", evidence.SMALLER | {"limit": 500})
    grid = [point for point in evidence.sensitivity_grid() if point.ssl["seed"] < 2]
    middle = {"epsilon": 0.1, "beta": 0.4, "dim": 128}
    for point in grid:
        at = {name: (point.vae | point.ssl).get(name, 0.1) for name in middle}
        changes = {name for name in middle if at[name] != middle[name]}
        assert changes <= {point.labels["axis"]}
    tasks = plans.plan(grid).values()
    assert sum(task.config.stage == "vae" for task in tasks) == 2 * 5
    grid.sort(key=lambda point: point.ssl["adversary"] == "none")
    for point in grid:
        about = evidence.describe_point(point)
        score = 40.0 if about["adversary"] == "none" else 42.0 + 2 * about["seed"]
        evidence.keep(about, {"kNN": score, "linear": score, "seconds": 9})
        if about["adversary"] != "none":  # stopped before those: there are means alone
            rows = [row["what"] for row in evidence.describe_sensitivity()]
            assert rows and not any("difference" in name for name in rows)
    rows = {row["what"]: row for row in evidence.describe_sensitivity()}
    places = [f"{axis}_{value:g}" for axis, values in evidence.AXES.items() for value in values]
    for place, metric in itertools.product(places, ("knn", "linear")):
        row = rows[f"evidence_difference_{place}_none_{metric}"]
        assert (row["value"], row["n"]) == (3.0, 2)
        assert row["spread"] == pytest.approx([3 - 12.7062, 3 + 12.7062], abs=1e-3)


def test_the_committed_evidence_is_of_the_networks_that_ship():
    import evidence

    lines = evidence.read_entries()
    ships = ("vae", "starter"), ("ssl", "starter"), ("ssl", "starter2")
    digests = [checkpoints.digest(runs.get(*names))[:12] for names in ships]
    studies = [entry for entry in lines if entry["part"] == "identity"]
    assert [[entry["vae"], *entry["encoders"]] for entry in studies][-1:] == [digests]
    assert {entry["vae"] for entry in lines if entry["part"] == "comparison"} <= {None, digests[0]}


def test_what_stops_a_benchmark_loses_no_part_before_it(monkeypatch):
    """And the file is of the threads that the sides have: those that this process was given."""

    def stop():
        raise KeyboardInterrupt

    calls, threads = [], torch.get_num_threads()
    keep = lambda name, protocol, rows: calls.append(  # noqa: E731
        (name, [r["what"] for r in rows], torch.get_num_threads())
    )
    monkeypatch.setattr(speed.record, "write", keep)
    monkeypatch.setattr(speed, "PARTS", {"a": lambda: [row("a", 1)], "b": stop})
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    try:
        with pytest.raises(KeyboardInterrupt):
            speed.main([])
        assert speed.main(["a"]) == 0
        assert speed.main(["c"]) == 2
    finally:
        torch.set_num_threads(threads)
    assert calls == [("speed", ["a"], cores), ("speed-a", ["a"], cores)]


def test_the_straightforward_nt_xent_is_the_loss_itself():
    """Slow, but right: a baseline that computes something else compares nothing."""
    z1, z2 = (
        F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=1).requires_grad_()
        for _ in range(2)
    )
    loss = sides.broadcast_nt_xent(z1, z2, 0.5)
    torch.testing.assert_close(loss, reference.nt_xent(z1, z2, 0.5))


def test_the_straightforward_network_rectifies_out_of_place_and_computes_the_same():
    network = build_backbone("resnet18", width=4, stem="cifar", adversarial_norms=False)
    x = torch.randn(2, 3, 32, 32)
    y = network.bn1(network.conv1(x)).detach()
    values = sides.out_of_place(lambda: F.relu(y, inplace=True))()
    assert y.min() < 0 <= values.min()
    torch.testing.assert_close(sides.out_of_place(lambda: network(x))(), network(x))
    assert F.relu(y, inplace=True) is y  # outside as ever


@pytest.mark.parametrize(
    "name", ["views-eager", "vae-ours", "idaa-straightforward", "transfer-ours", "validation-ours"]
)
def test_a_side_works(name, monkeypatch, tmp_path):
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(sides, "BATCH", 16)
    monkeypatch.setattr(sides, "VAE_BATCH", 16)
    monkeypatch.setattr(sides, "VAE_STEPS", 1)
    monkeypatch.setattr(sides, "BANK", 32)
    monkeypatch.setattr(sides, "COMPILE", False)  # which is tested in test_train
    monkeypatch.setattr(sides, "QUERIES", 8)
    monkeypatch.setattr(sides, "PROBED", 100)
    work = sides.PARTS[name]()
    work(), work()


@pytest.mark.parametrize(("name", "gflop"), [("simclr", 6.67), ("idaa", 12.5)])
def test_a_profile_s_parts_make_up_the_step_and_its_work_is_what_one_counts(
    name, gflop, monkeypatch, tmp_path
):
    """Per image: 6 units of an encoder's forward pass without an adversary; with IDAA, whose attack
    is one forward and one input-only backward pass, 11 and the VAE's share."""
    figures = {}
    monkeypatch.setenv("IDAA_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(sides, "BATCH", 8)
    monkeypatch.setattr(profile_step, "STEPS", 1)
    monkeypatch.setattr(profile_step, "ceilings", lambda: (1e12, 1e10))
    keep = lambda name, protocol, rows: figures.update({r["what"]: r["value"] for r in rows})  # noqa: E731
    monkeypatch.setattr(profile_step.record, "write", keep)
    assert profile_step.main([name]) == 0
    assert figures["computed"] / 8 == pytest.approx(gflop, rel=0.02)
    parts = [
        "random numbers",
        "views",
        "forward",
        "backward",
        "optimiser",
        "losses, logging, the rest",
    ]
    parts += ["attack", "adversarial forward"] * (name == "idaa")
    assert all(figures[part] > 0 for part in parts)
    # They lie inside the step, each counted once; what is outside them only fetches the images.
    total, step = sum(figures[part] for part in parts), figures["step_seconds"]
    assert step / 2 < total < 1.01 * step
    assert (tmp_path / "profile" / f"{name}-trace.json").stat().st_size > 1000


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix product"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<__nv_bfloat16, float>", "normalisation"),
        ("void at::native::batch_norm_backward_elemt_channels_last_kernel<4>", "normalisation"),
        ("void cudnn::ops::nchwToNhwcKernel<__half>", "layout"),
        ("void at::native::vectorized_elementwise_kernel<4>", "elementwise"),
        ("triton_red_fused_native_batch_norm_backward_3", "normalisation"),
        ("void at::native::reduce_kernel<512, 1>", "reduction"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel", "optimiser"),
        ("Memcpy HtoD (Pinned -> Device)", "copy"),
        ("void grid_sampler_2d_kernel", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel, kind):
    assert profile_step.kind(kernel) == kind


def test_kernels_are_summed_by_kind_and_step():
    kernels = [("gemm", 1000.0), ("gemm", 2000.0), ("Memset", 500.0), ("gemm", 3000.0)]
    rows = profile_step.kernel_rows(kernels, 2)
    assert [(r["what"], r["value"], r["baseline"]) for r in rows] == [
        ("kernels_all", 3.25, 2), ("kernels_matrix product", 3.0, 2), ("kernels_copy", 0.25, 0),
    ]  # fmt: skip
