"""Run directories and checkpoints: identity, states, locks, damage, full disks."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest
import torch

from idaa_lib import runs
from idaa_lib.configs import ConfigError, EvalConfig, SemiConfig, SSLConfig, VAEConfig
from idaa_lib.methods import METHODS, register_method
from idaa_lib.runs import Run, RunError, Stopped, checkpoints, directory


def run_of(outputs, config=None, **digests):
    return runs.run_for(config or VAEConfig(), "pixels", **digests)


def test_an_id_is_readable_and_the_same_again(outputs):
    config = SSLConfig(adversary="idaa", epsilon=0.3, seed=2)
    run = run_of(outputs, config, vae="weights")
    assert run.id.startswith("ssl-photos-simclr-idaa-epsilon=0.3-vae=weig-s2-")
    assert run == run_of(
        outputs, SSLConfig(adversary="idaa", epsilon="3/10", seed=2), vae="weights"
    )
    assert run.path.parent == outputs / "ssl"


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"epsilon": 0.2}, False),
        ({"epochs": 7}, False),
        ({"compile": True}, False),
        ({"device": "cpu"}, True),
        ({"tracker": "tensorboard"}, True),
        ({"log_every": 3}, True),
        ({"checkpoint_minutes": 3}, True),
        ({"vae": "another name of the same weights"}, True),
    ],
)
def test_identity_is_what_decides_the_result(outputs, change, same):
    base = {"adversary": "idaa", "epsilon": 0.3}
    first = run_of(outputs, SSLConfig(**base), vae="w").id.rsplit("-", 1)[1]
    second = run_of(outputs, SSLConfig(**(base | change)), vae="w").id.rsplit("-", 1)[1]
    assert (first == second) is same


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("stage", [VAEConfig, SSLConfig, EvalConfig])
def test_identity_has_the_precision_that_is_meant_here(outputs, monkeypatch, native, stage):
    """fp32 of one machine and bf16 of another are no run of one id."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    fields = {"run": "r"} if stage is EvalConfig else {}
    auto, fp32, bf16 = (
        run_of(outputs, stage(precision=precision, device="cpu", **fields)).id.rsplit("-", 1)[1]
        for precision in ("auto", "fp32", "bf16")
    )
    assert fp32 != bf16 and auto == (bf16 if native else fp32)


def test_a_field_that_is_added_later_changes_no_id(outputs):
    class Later(SSLConfig):
        further: float = 0.0

    for values in ({}, {"adversary": "idaa", "epsilon": 0.3, "preset": "paper"}):
        assert run_of(outputs, Later(**values)) == run_of(outputs, SSLConfig(**values))
    assert run_of(outputs, Later(further=1.0)).id != run_of(outputs, SSLConfig()).id


def test_identity_covers_data_and_vae(outputs):
    config = SSLConfig(adversary="idaa")
    ids = {
        runs.run_for(config, data, vae=vae).id for data in ("a", "b") for vae in ("w", "v")
    }  # fmt: skip
    assert len(ids) == 4


def test_states_follow_what_happens(outputs):
    run = run_of(outputs)
    assert run.state["state"] == "new"
    with run.writing(VAEConfig(), {"versions": {}}) as writer:
        assert run.state["state"] == "going"
        assert run.state["pid"] == os.getpid()
        writer.log(step=1, loss=2.0)
        writer.finish({"kl": 1.0})
    assert run.state["state"] == "finished"
    assert run.summary == {"kl": 1.0}
    assert run.metrics() == [{"step": 1, "loss": 2.0}]
    assert run.config == VAEConfig()


@pytest.mark.parametrize(
    ("clock", "handler"), [(0.0, signal.SIG_IGN), (-1e6, signal.default_int_handler)]
)
def test_work_without_steps_beats_and_hears_a_stop(outputs, monkeypatch, clock, handler):
    """Also where the machine's clock was set back meanwhile, and in the background of a shell,
    where SIGINT is ignored."""
    run, now = run_of(outputs), time.time
    before = signal.signal(signal.SIGINT, handler)
    monkeypatch.setattr(directory, "BEAT", 0.5)
    beats = set()

    def work():
        with run.writing(VAEConfig(), {}):
            monkeypatch.setattr(directory.time, "time", lambda: now() + clock)
            while time.monotonic() < start + 30:
                time.sleep(0.01)
                beats.add(run.state["heartbeat"])
                if len(beats) == 3:
                    run.ask("stop")

    start = time.monotonic()
    try:
        with pytest.raises(Stopped, match=rf"^Stopped: start {run.id} again"):
            work()
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() < start + 10
    assert run.state["state"] == "interrupted"


def test_what_rebuilds_a_network_is_stored_beside_its_configuration(outputs):
    run, model = run_of(outputs), {"size": 32, "mean": [0.5], "std": [0.2], "classes": 10}
    with run.writing(VAEConfig(), {}, model) as writer:
        assert run.model == model  # before work starts
        writer.finish({})
    assert run.model == model
    (run.path / "model.json").unlink()
    with pytest.raises(RunError, match=r"has no model\.json.*delete the folder and start it again"):
        _ = run.model


def test_a_failure_is_kept_with_its_reason(outputs):
    run = run_of(outputs)
    with pytest.raises(ZeroDivisionError), run.writing(VAEConfig(), {}):
        _ = 1 / 0
    assert run.state["state"] == "failed"
    assert run.state["error"] == "ZeroDivisionError: division by zero"


def hold(path, config, event):
    with Run(path).writing(config, {}):
        event.set()
        time.sleep(60)


def test_one_writer_at_a_time_and_a_killed_one_is_interrupted(outputs):
    run = run_of(outputs)
    context = multiprocessing.get_context("spawn")
    event = context.Event()
    process = context.Process(target=hold, args=(run.path, VAEConfig(), event))
    process.start()
    assert event.wait(60)
    assert run.state["state"] == "going"
    before = (run.path / "config.json").read_bytes()
    sentence = rf"being written by process {process.pid} on"
    with pytest.raises(RunError, match=sentence), run.writing(VAEConfig(seed=1), {}):
        pass
    assert (run.path / "config.json").read_bytes() == before
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert run.state["state"] == "interrupted"
    with run.writing(VAEConfig(), {}):  # the lock died with its holder
        pass


def test_a_line_half_written_is_not_read(outputs):
    run = run_of(outputs)
    with run.writing(VAEConfig(), {}) as writer:
        writer.log(step=1)
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "lo')
        assert run.metrics() == [{"step": 1}]
        writer.rewind(1)
        writer.log(step=2)
    assert [line["step"] for line in run.metrics()] == [1, 2]


def test_rewind_drops_what_came_after_the_checkpoint(outputs):
    run = run_of(outputs)
    with run.writing(VAEConfig(), {}) as writer:
        for step in range(5):
            writer.log(step=step)
        writer.rewind(2)
    assert [line["step"] for line in run.metrics()] == [0, 1, 2]


def finish_run(config, summary=None):
    run = runs.run_for(config, "pixels")
    with run.writing(config, {}) as writer:
        writer.finish(summary or {})
    return run


def test_runs_are_found_newest_first_by_their_values(outputs):
    first, second = finish_run(VAEConfig(dim=32)), finish_run(VAEConfig(dim=64))
    with (
        pytest.raises(ZeroDivisionError),
        run_of(outputs, VAEConfig(dim=16)).writing(VAEConfig(dim=16), {}),
    ):
        _ = 1 / 0
    assert runs.find("vae") == [second, first]
    assert len(runs.find("vae", finished=False)) == 3
    assert runs.find("vae", dim=32) == [first]
    assert runs.get("vae", None) == second
    assert runs.get("vae", first.id) == first
    assert runs.get("vae", str(first.path)) == first


def test_a_run_of_another_version_is_refused_in_one_sentence_and_hides_no_other(outputs):
    run, old_run, strange_run = (finish_run(VAEConfig(dim=dim)) for dim in (32, 64, 16))
    (old_run.path / "environment.json").write_text('{"results_version": 4}')
    (strange_run.path / "config.json").write_text('{"dim": 8, "field_of_before": 1}')
    sentence = r"made by another version .*: delete .* and make it again with notebooks/01_pretrain"
    for each in (old_run, strange_run):
        with pytest.raises(RunError, match=sentence):
            _ = each.config
    assert runs.find("vae") == runs.find("vae", finished=False) == [run]
    assert runs.get("vae", None) == run
    assert set(runs.list_runs()) == {run, old_run, strange_run}  # for whoever shows or deletes them


@pytest.mark.parametrize(
    "config",
    [
        VAEConfig(beta="8/255", mean=(0.5, 0.5, 0.5)),
        SSLConfig(preset="paper", method="moco", adversary="idaa", vae="v", queue=64),
        SemiConfig(adversary="clae", steps=3),
        EvalConfig(run="r"),
    ],
    ids=lambda c: c.stage,
)
def test_a_stored_configuration_is_the_one_that_ran(outputs, config):
    stored_config = finish_run(config).config
    assert stored_config == config and stored_config.identity() == config.identity()
    assert stored_config.replace(seed=7) == config.replace(seed=7)


def test_a_run_is_read_whatever_became_of_its_recipe_and_its_method(outputs, tmp_path):
    recipe = tmp_path / "own.toml"
    recipe.write_text("extends = 'demo'\n[ssl]\nepochs = 7\n")

    class Mine(METHODS["simclr"]):
        class Options(METHODS["simclr"].Options):
            pull: float = 1.0

    register_method("mine")(Mine)
    try:
        config = SSLConfig(preset=str(recipe), method="mine", pull=2.0, seed=3)
        run = finish_run(config)
        recipe.write_text("extends = 'demo'\n[ssl]\nepochs = 8\nlimit = 5\n")
        assert (run.config, run.config.epochs, run.config.pull) == (config, 7, 2.0)
    finally:
        del METHODS["mine"]
    recipe.unlink()
    assert (run.config.epochs, run.config.method, run.config.seed) == (7, "mine", 3)
    assert runs.find("ssl", epochs=7) == [run] and run.config.list_changes()["epochs"] == 7
    with pytest.raises(ConfigError, match=r"method must be one of .*import the module"):
        run.config.get_chosen("method")


def test_outputs_can_be_moved(outputs, monkeypatch):
    """What a configuration says of a run below outputs/ is its id, however it was named."""
    vae = finish_run(VAEConfig())
    link = outputs.parent / "link"
    link.symlink_to(outputs)
    for name in (vae.id, str(vae.path), str(link / "vae" / vae.id), vae):
        assert runs.get("vae", name).reference == vae.id
        assert Run(link / "vae" / vae.id).reference == vae.id
    config = SSLConfig(adversary="idaa", vae=runs.get("vae", str(vae.path)).reference)
    run = finish_run(config)
    folder = outputs.rename(outputs.parent / "moved")
    monkeypatch.setenv("IDAA_OUTPUTS", str(folder))
    copy = runs.get("ssl", run.id)
    assert copy == runs.run_for(config, "pixels") and copy.path.parent.parent == folder
    assert runs.get("vae", copy.config.vae).users() == [copy]


def test_a_missing_or_unfinished_run_is_one_sentence(outputs):
    with pytest.raises(RunError, match=r"no finished vae run with dim=3 .*01_pretrain_vae"):
        runs.get("vae", None, dim=3)
    with pytest.raises(RunError, match="no vae run 'nothing'"):
        runs.get("vae", "nothing")
    run = run_of(outputs)
    with pytest.raises(ZeroDivisionError), run.writing(VAEConfig(), {}):
        _ = 1 / 0
    with pytest.raises(RunError, match="is failed, not finished"):
        runs.get("vae", run.id)
    for call in (runs.find, lambda stage: runs.get(stage, None)):
        with pytest.raises(RunError, match="no stage 'sll'; there are vae, ssl"):
            call("sll")
    with pytest.raises(RunError, match="A ssl run has no field 'methd'; did you mean 'method'"):
        runs.find("ssl", methd="simclr")


def test_an_evaluation_is_the_same_run_by_whatever_recipe(outputs):
    run = finish_run(EvalConfig(run="r"))
    again = EvalConfig(preset="cifar10", run="r", limit=EvalConfig(run="r").limit)
    assert again.list_changes() != run.config.list_changes()
    assert runs.run_for(again, "pixels") == run


def test_an_id_fits_a_file_s_name_in_any_language(outputs):
    config = VAEConfig(dataset="猫" * 70, limit=7)
    run = finish_run(config)
    assert run.id.startswith("vae-猫") and runs.run_for(config, "pixels") == run


# --- checkpoints ---------------------------------------------------------------------------------


def some(step):
    weight = torch.arange(24.0).view(1, 4, 2, 3).add(step)
    return {
        "a": weight.to(memory_format=torch.channels_last),
        "b": torch.tensor(step),
        "tied": weight[0],
        "half": torch.ones(3, dtype=torch.bfloat16),
    }


@pytest.fixture
def run(outputs):
    new_run = run_of(outputs)
    new_run.path.mkdir(parents=True)
    return new_run


def test_what_is_saved_comes_back_and_two_are_kept(run):
    for step in (1, 2, 3):
        checkpoints.save(run, step, some(step), {"step": step})
    tensors, state = checkpoints.load(run)
    assert state == {"step": 3}
    assert all(torch.equal(tensors[k], v) for k, v in some(3).items())
    assert all(tensors[k].dtype == v.dtype for k, v in some(3).items())
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["2", "3"]


def test_other_folders_beside_checkpoints_are_left_alone(run):
    checkpoints.save(run, 1, some(1), {"step": 1})
    for name in ("1.bak", "1 (conflicted copy)", "2x"):
        shutil.copytree(run.path / "checkpoints" / "1", run.path / "checkpoints" / name)
    checkpoints.save(run, 2, some(2), {"step": 2})
    assert checkpoints.load(run)[1] == {"step": 2}
    assert len([*(run.path / "checkpoints").iterdir()]) == 5


def test_a_finished_run_is_its_last_checkpoint_or_none(outputs):
    run = finish_run(VAEConfig())
    for step in (1, 2):
        checkpoints.save(run, step, some(step), {"step": step})
    shutil.rmtree(run.path / "checkpoints" / "2")
    with pytest.raises(RunError, match="are gone, though it had one at step 2"):
        checkpoints.load(run)


def test_no_checkpoint_is_none(run):
    assert checkpoints.load(run) is None


def test_a_damaged_checkpoint_falls_back_to_the_one_before(run):
    for step in (1, 2):
        checkpoints.save(run, step, some(step), {"step": step})
    path = run.path / "checkpoints" / "2" / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoints.load(run)[1] == {"step": 1}
    (run.path / "checkpoints" / "1" / "state.json").unlink()
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(RunError, match=r"Every checkpoint of .* is damaged"),
    ):
        checkpoints.load(run)


def test_a_full_disk_leaves_the_checkpoint_before_intact(run, monkeypatch):
    checkpoints.save(run, 1, some(1), {"step": 1})

    def refuse(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "save_file", refuse)
    with (
        pytest.raises(RunError, match=r"No space left .* what was saved is intact"),
        run.writing(VAEConfig(), {}),
    ):
        checkpoints.save(run, 2, some(2), {"step": 2})
    assert checkpoints.load(run)[1] == {"step": 1}
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["1"]


def test_nothing_in_a_checkpoint_unpickles(run):
    checkpoints.save(run, 1, some(1), {"step": 1})
    files = sorted(p.name for p in (run.path / "checkpoints" / "1").iterdir())
    assert files == ["checksums.json", "state.json", "tensors.safetensors"]
    header = (run.path / "checkpoints" / "1" / "tensors.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert set(json.loads(header[8 : 8 + length])) - {"__metadata__"} == set(some(1))


def test_the_digest_is_of_the_weights(run, outputs):
    checkpoints.save(run, 1, some(1), {"step": 1})
    one = checkpoints.digest(run)
    checkpoints.save(run, 2, some(1), {"step": 2})
    assert checkpoints.digest(run) == one
    checkpoints.save(run, 3, some(3), {"step": 3})
    assert checkpoints.digest(run) != one
