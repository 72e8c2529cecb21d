"""The runs page without a browser, and what it does to run directories."""

import html
import json
import os
import re
import shlex
import shutil
import time
from pathlib import Path

import nbformat
import pytest

from idaa_lib import results, runs
from idaa_lib.configs import EvalConfig, SSLConfig, VAEConfig
from idaa_lib.lab import notebook, process
from idaa_lib.lab.kernel import guard, hide_paths
from idaa_lib.lab.rows import COLUMNS
from idaa_lib.lab.runs import TABLE, RunsPage
from idaa_lib.runs import Run, RunError
from idaa_lib.train import train_vae

TINY = {"limit": 64, "width": 4, "epochs": 1, "batch_size": 32, "device": "cpu"}


def made(config, summary=None, fingerprint="pixels", error=None, lines=()):
    """A run directory written by hand; failed with `error`, finished with `summary`."""
    weights = {"encoder": getattr(config, "run", None), "vae": getattr(config, "vae", None)}
    run = runs.run_for(config, fingerprint, **weights)
    environment = {"dataset": {"name": "photos", "n": 64, "fingerprint": fingerprint}}
    try:
        with run.writing(config, environment) as writer:
            for line in lines:
                writer.log(**line)
            writer.state(state="going", step=7, steps=20)
            if error:
                raise RunError(error)
            if summary is None:
                raise KeyboardInterrupt
            writer.finish(summary)
    except (KeyboardInterrupt, RunError):
        pass
    return run


def judgement(top1, n=100, protocol="clean: backbone"):
    values = {"protocol": protocol.split(":")[0]}
    for key in ("knn", "linear"):
        values |= {f"{key}_top1": top1, f"{key}_low": top1 - 4, f"{key}_high": top1 + 4}
        values |= {f"{key}_n": n, f"{key}_protocol": f"{protocol} {key}"}
    return values


def texts(page):
    """The lines of the table, by run id."""
    frame = page.table.df.astype(object).fillna("").astype(str)
    return {line["id"]: line for line in frame.to_dict("records")}


def pick(page, *selection):
    """Choose these lines, as a click on each does."""
    ids = [*page.table.df["id"]]
    page.table.selected_rows = [ids.index(run.id) for run in selection]


@pytest.fixture
def going(outputs):
    """A run that a process writes: this one, whose lock holds against itself too."""
    run = runs.run_for(VAEConfig(seed=77), "pixels")
    with run.writing(VAEConfig(seed=77), {}):
        yield run


# --- the library's part --------------------------------------------------------------------------

ODD = [
    VAEConfig(),
    VAEConfig(preset="cifar10"),
    VAEConfig(beta="8/255", seed=3, learning_rate=1e-5),
    VAEConfig(kappa=1 / 3, dim=48, split="trainval"),
    VAEConfig(dataset="/data/it's a folder; rm -rf $HOME/ü=1", size=224),
    SSLConfig(),
    SSLConfig(adversary="clae", epsilon=0.0, random_start=True),
    SSLConfig(preset="paper", adversary="idaa", vae="/else where/vae/run=1", step_size="2/3"),
    SSLConfig(adversary="random_sign", temperature=0.1 + 0.2, alpha=0),
    SSLConfig(preset="paper", adversary="clae", reuse_anchor=True, norm="l2", steps=5),
    EvalConfig(run="2024"),
    EvalConfig(preset="paper", run="ssl-x", dataset="none", references=False, k=1, limit=5),
]


@pytest.mark.parametrize("config", ODD, ids=lambda c: c.stage)
def test_the_command_says_the_configuration(outputs, config):
    """Read as `python -m idaa_lib.train` reads it."""
    words = shlex.split(runs.command(made(config)))
    assert words[:4] == ["python", "-m", "idaa_lib.train", config.stage]
    values = dict(word.split("=", 1) for word in words[4:])
    assert type(config)(**values) == config


def test_the_command_says_no_more_than_it_must(outputs):
    config = SSLConfig(adversary="idaa", epsilon=0.3, vae="v")
    assert runs.command(made(config)) == (
        "python -m idaa_lib.train ssl preset=demo adversary=idaa epsilon=0.3 vae=v"
    )


def test_all_runs_are_listed_damaged_ones_too(outputs):
    first = made(VAEConfig(), {})
    damaged_run = made(SSLConfig(seed=1), error="x")
    (damaged_run.path / "config.json").write_text("{")
    last = made(EvalConfig(run="r"))
    assert set(runs.list_runs()) == {first, damaged_run, last}


def test_users_name_a_run_by_id_or_path(outputs):
    vae = made(VAEConfig(), {})
    by_id = made(SSLConfig(adversary="idaa", vae=vae.id))
    by_path = made(SSLConfig(adversary="idaa", vae=str(vae.path), epsilon=0.7))
    more = made(VAEConfig(continue_from=vae.id, seed=5))
    made(SSLConfig())
    evaluation = made(EvalConfig(run=by_id.id))
    assert set(vae.users()) == {by_id, by_path, more}
    assert by_id.users() == [evaluation]
    assert evaluation.users() == []


def test_deletion_frees_what_the_size_says(outputs):
    run, other = made(VAEConfig(), {}), made(VAEConfig(seed=1), {})
    (run.path / "checkpoints" / "1").mkdir(parents=True)
    (run.path / "checkpoints" / "1" / "t").write_bytes(b"x" * 100_000)
    files = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    before = run.size
    assert files <= before < files + 50_000  # folders have a size too
    assert run.delete() == before
    assert runs.list_runs() == [other]
    assert [path.name for path in run.path.parent.iterdir()] == [other.id]
    with pytest.raises(RunError, match="no run directory"):
        run.delete()


def test_what_is_written_or_no_run_is_not_deleted(going, tmp_path):
    with pytest.raises(RunError, match="is going: stop it"):
        going.delete()
    assert (going.path / "config.json").exists()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match="no run directory"):
        Run(tmp_path).delete()
    assert (tmp_path / "config.json").exists()


def test_a_deletion_that_broke_off_leaves_no_run(outputs, monkeypatch):
    run = made(VAEConfig(), {})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *a, **k: (_ for _ in ()).throw(OSError("cut")))
        with pytest.raises(RunError, match="could not be deleted: cut"):
            run.delete()
    assert runs.list_runs() == []
    assert not run.finished
    assert made(VAEConfig(), {}) == run and run.finished  # what is left hinders nothing


# --- the page ------------------------------------------------------------------------------------


def test_rows_say_state_reason_result_and_damage(outputs, going):
    ssl = made(SSLConfig(adversary="clae", epsilon=0.05, seed=4), {"knn_top1_val": 41.26})
    failed_run = made(VAEConfig(seed=2), error="The loss is nan <b>here</b>: lower learning_rate.")
    idaa = made(SSLConfig(adversary="idaa"), {})
    broken_run = made(VAEConfig(seed=3), {})
    (broken_run.path / "config.json").write_text('{"preset": "de')
    stopped_run = made(VAEConfig(dim=32))
    page = RunsPage()
    rows = texts(page)
    assert page.status.value == ""
    expected = {
        "state": "✓ finished", "data": "photos", "method": "SimCLR", "adversary": "CLAE ε=0.05",
        "differs from preset": "", "seed": "4", "result": "kNN 41.3 %, validation",
    }  # fmt: skip
    assert expected.items() <= rows[ssl.id].items()
    assert rows[idaa.id]["adversary"] == "IDAA ε=0.1"  # the recipe's, which is searched too
    # What a user types for a field by its name is searched too, for what an evaluation judges too.
    judge = made(EvalConfig(run=ssl.id), judgement(40.0))
    page.refresh()
    for run, words in (
        (ssl, "method=simclr adversary=clae epsilon=0.05 seed=4"), (judge, "epsilon=0.05 seed=0"),
        (idaa, "epsilon=0.1 seed=0"), (failed_run, "seed=2"), (stopped_run, "dim=32"),
    ):  # fmt: skip
        assert {*words.split()} <= {*texts(page)[run.id]["fields"].split(", ")}
    silent = {i for kind in TABLE["columnDefs"] if kind.get("searchable") is False
              for i in kind["targets"]}  # fmt: skip
    assert COLUMNS.index("fields") not in silent
    assert rows[going.id]["state"] == "▶ going"
    assert going.id[-8:] in page.head.value
    assert rows[stopped_run.id]["state"] == "◼ interrupted, 7 of 20"
    assert rows[failed_run.id]["state"].startswith("✗ failed")
    assert rows[failed_run.id]["result"] == "The loss is nan <b>here</b>: lower learning_rate."
    assert "<b>here" not in json.dumps(page.table.get_state())  # it is text, and no HTML
    assert rows[broken_run.id]["state"] == "⚠ damaged"
    assert "is damaged" in rows[broken_run.id]["result"]


def test_a_training_has_what_its_evaluations_found(outputs):
    ssl, other = made(SSLConfig(), {"knn_top1_val": 41.26}), made(SSLConfig(seed=1), {})
    judge = made(EvalConfig(run=ssl.id), judgement(40.04))
    made(EvalConfig(run=str(ssl.path), protocol="official"), judgement(60.0, 96, "official: z"))
    rows = texts(RunsPage())
    assert rows[ssl.id]["result"] == "kNN 41.3 %, validation"
    assert rows[judge.id]["result"] == "kNN 40.0 %, linear 40.0 %, test, clean"
    for run in (ssl, judge):
        assert rows[run.id]["test kNN (%)"] == "40.0 [36.0, 44.0]"
        assert rows[run.id]["test linear (%)"] == "40.0 [36.0, 44.0]"
    assert rows[ssl.id]["official kNN (%)"] == "60.0 [56.0, 64.0]"
    assert rows[judge.id]["official kNN (%)"] == rows[other.id]["test kNN (%)"] == ""


def test_accuracies_are_sorted_as_numbers(outputs):
    values = (9.5, 100.0, 41.0)
    for seed, value in enumerate(values):
        made(EvalConfig(run=made(SSLConfig(seed=seed), {}).id), judgement(value))
    frame = RunsPage().table.df
    order = frame.sort_values("test kNN (%)")["test kNN (%)"].dropna().unique()
    assert [float(text.split()[0]) for text in order] == sorted(values)


def test_runs_of_several_seeds_are_one_line_on_request(outputs):
    trainings = [made(SSLConfig(seed=s), {"knn_top1_val": 10.0 + s}) for s in (10, 2, 0)]
    for run, value in zip(trainings, (40.0, 50.0, 60.0), strict=True):
        made(EvalConfig(run=run.id), judgement(value))
    other, stopped_run = made(SSLConfig(epsilon=0.3, adversary="clae"), {}), made(SSLConfig(seed=3))
    page = RunsPage()
    pick(page, trainings[0])
    page.means.value = True
    frame = page.table.df
    assert len(frame) == 3  # these, the other, and the evaluations of these
    (line,) = frame[frame["id"].str.contains(trainings[0].id, regex=False)].to_dict("records")
    assert line["seed"] == "0, 2, 3, 10"
    assert line["state"] == "◼ 1 interrupted, ✓ 3 finished"
    # Of 40, 50, 60 the mean is 50 and Student's half-width 4.3027 · 10 / √3.
    assert line["test kNN (%)"] == line["test linear (%)"] == "50.0 [25.2, 74.8]"
    assert line["result"] == "kNN 14.0 [0.9, 27.1] %, validation"
    assert {*page.picked} == {*trainings, stopped_run}  # a line is all of its runs
    # A newer evaluation, of fewer images, stands beside none of the others: no mean.
    evaluation = made(EvalConfig(run=trainings[1].id, limit=50), judgement(10.0, n=50))
    runs.write_json(
        evaluation.path / "state.json", evaluation.state | {"started": time.time() + 60}
    )
    os.utime(evaluation.path / "config.json", (time.time() + 60,) * 2)
    page.refresh()
    rows = page.table.df[page.table.df["seed"].astype(str) == "0, 2, 3, 10"]
    assert rows["test kNN (%)"].isna().all()
    page.means.value = False
    assert {*texts(page)} >= {other.id, stopped_run.id} and {*page.picked} == {
        *trainings,
        stopped_run,
    }


def test_a_mean_over_fewer_trainings_than_its_line_says_so(outputs):
    trainings = [made(SSLConfig(seed=s), {"knn_top1_val": 10.0}) for s in range(3)]
    for run, top1 in zip(trainings, (40.0, 42.0), strict=False):
        made(EvalConfig(run=run.id), judgement(top1))
    official = judgement(50.0, protocol="official: x")
    made(EvalConfig(run=trainings[0].id, protocol="official"), official)
    page = RunsPage()
    page.means.value = True
    frame = page.table.df
    (line,) = frame[frame["stage"] == "ssl"].to_dict("records")
    assert line["seed"] == "0, 1, 2"
    assert line["test kNN (%)"] == "41.0 [28.3, 53.7], 2 of 3"
    assert line["official kNN (%)"] == "50.0 [46.0, 54.0], 1 of 3"


def test_a_training_has_the_newest_figures_on_its_own_images(outputs):
    run = made(SSLConfig(), {})
    evaluations = [
        made(EvalConfig(run=run.id, **values), judgement(top1))
        for values, top1 in (({}, 40.0), ({"limit": 50}, 41.0), ({"dataset": "cifar10"}, 99.0))
    ]
    lines = texts(RunsPage())
    assert lines[run.id]["test kNN (%)"] == "41.0 [37.0, 45.0]"  # of one minute the later one
    assert lines[evaluations[2].id]["test kNN (%)"] == "99.0 [95.0, 103.0]"


def test_runs_with_a_vae_of_their_own_seed_are_one_line(outputs):
    for seed in (0, 1):
        vae = made(VAEConfig(seed=seed), {})
        made(SSLConfig(adversary="idaa", vae=vae.id, seed=seed), {"knn_top1_val": 10.0})
    made(SSLConfig(adversary="idaa", vae=made(VAEConfig(dim=8), {}).id), {})
    page = RunsPage()
    page.means.value = True
    frame = page.table.df
    assert sorted(frame[frame["stage"] == "ssl"]["seed"].astype(str)) == ["0", "0, 1"]


def test_tags_stay_beside_the_run(outputs):
    run, other = made(VAEConfig(), {}), made(VAEConfig(seed=1), {})
    page = RunsPage()
    pick(page, run, other)
    page.tags.value = "for the paper, $5, for the paper"
    page.tag.click()
    pick(page, other)
    assert page.tags.value == "for the paper, $5"
    page.tags.value = ""
    page.tag.click()
    assert texts(page)[run.id]["tags"] == "for the paper, $5"
    assert texts(page)[other.id]["tags"] == "" and page.picked == [other]
    assert texts(RunsPage())[run.id]["tags"] == "for the paper, $5"
    assert {*runs.list_runs()} == {run, other} and made(VAEConfig(), {}) == run


def test_only_a_table_that_changed_is_sent(outputs, going):
    run = made(VAEConfig(), {})
    page, changes = RunsPage(), []
    pick(page, run)
    for widget in (page.table, page.chosen, page.curves):
        widget.observe(lambda change: changes.append(change["name"]))
    runs.write_json(going.path / "state.json", going.state | {"step": 9, "steps": 20})
    page.refresh()
    assert "9 of 20" in page.head.value and changes == []  # a step further is no other table
    new_run = made(VAEConfig(seed=1), {})
    page.refresh()
    assert new_run.id in texts(page) and page.picked == [run]
    (run.path / "config.json").unlink()
    page.refresh()
    assert run.id not in texts(page) and page.picked == []
    pick(page, new_run)
    assert page.picked == [new_run]


def test_a_thousand_runs_are_read_once(outputs, monkeypatch):
    first = made(SSLConfig(), {"knn_top1_val": 41.0})
    files = {p.name: p.read_text() for p in first.path.glob("*.json")}
    for seed in range(1, 1000):
        folder = first.path.with_name(f"ssl-copy-{seed:08}")
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text.replace('"seed": 0', f'"seed": {seed}'))
    reads = []
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda *a, **k: reads.append(a[0]) or read(*a, **k))
    start = time.monotonic()
    page = RunsPage()
    end = time.monotonic()
    assert len(texts(page)) == 1000
    assert len(reads) <= 9 * 1000 and end - start < 60
    assert sum(path.name == "config.json" for path in reads) <= 1000
    reads.clear()
    start = time.monotonic()
    page.refresh()
    assert reads == [] and time.monotonic() - start < 2
    runs.Run(folder).tag(["x"])
    page.refresh()
    assert {path.parent for path in reads} == {folder}
    assert texts(page)[folder.name]["tags"] == "x"
    config = json.loads(read(folder / "config.json"))
    (folder / "config.json").write_text(json.dumps(config | {"seed": 1234}))
    page.refresh()
    assert texts(page)[folder.name]["seed"] == "1234"


def test_the_thread_follows_until_the_page_is_closed(outputs, monkeypatch):
    page = RunsPage()
    page.show()
    run = made(VAEConfig(), {})
    deadline = time.monotonic() + 20
    while run.id not in texts(page) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert run.id in texts(page)
    again = RunsPage()
    again.show()  # the cell ran again
    assert page._closed.is_set()
    again.close()


def test_the_difference_is_exactly_the_fields_that_differ(outputs):
    one = made(SSLConfig(adversary="idaa", epsilon=0.3, vae="vae-a"), {})
    two = made(SSLConfig(adversary="idaa", epsilon=0.1, vae="vae-a", width=8, alpha=2), {})
    vae = made(VAEConfig(), {})
    page = RunsPage()
    pick(page, one, two, vae)
    a, b = one.config.model_dump(), two.config.model_dump()
    expected = {k: {f"{a[k]:g}", f"{b[k]:g}"} for k in a if a[k] != b[k]}
    assert set(expected) == {"epsilon", "width", "alpha"}
    cell = r"\s*<td>(.*?)</td>"
    rows = re.findall(rf"<tr>{3 * cell}\s*</tr>", page.diff.value)
    assert {name: set(values) for name, *values in rows} == expected
    assert set(results.labels([one, two])) == {
        "SimCLR + IDAA, width = 16, alpha = 1, ε = 0.3",
        "SimCLR + IDAA, width = 8, alpha = 2, ε = 0.1",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/srv/u/outputs/vae/x is damaged", "…/x is damaged"),
        ("delete '/srv/u/a b.zip'; C:\\u\\v.py:3", "delete '…/a b.zip'; …/v.py:3"),
        ("kNN/linear of 8/255, 66 images/s", "kNN/linear of 8/255, 66 images/s"),
        ("<b>~/data/x</b><br/><i>a</i>", "<b>…/x</b><br/><i>a</i>"),
        ('<svg xmlns="http://www.w3.org/2000/svg">', '<svg xmlns="http://www.w3.org/2000/svg">'),
        ("There is no /home/anna marie/pets/x.zip.", "There is no …/x.zip."),
        ("There is no /home/anna marie: mount it", "There is no …: mount it"),
        ("It is in /home/anna marie.", "It is in …."),
        ("neither /repo dir/x nor /repo dir/data/x is there", "neither …/x nor …/x is there"),
        ("<b>/my data &amp; more/a/b.zip</b>", "<b>…/b.zip</b>"),
        ("Left out: v-1: /tmp/our outputs/vae/v-1/config.json", "Left out: v-1: …/config.json"),
        ("'/srv/my data/pets' and /srv/x", "'…/pets' and …/x"),
        ("dataset=&#x27;/srv/my data/pets&#x27; is", "dataset=&#x27;…/pets&#x27; is"),
        ("C:\\Users\\Anna Marie\\x.zip and D:\\y", "…/x.zip and …/y"),
        ("\\\\server\\share\\x.zip", "…/x.zip"),
        ("file:///srv/anna/x, //srv/anna/x", "…/x, …/x"),
        ("in /data", "in …/data"),
        ("(/srv/x) dataset=/srv/y", "(…/x) dataset=…/y"),
        ("a / b, and/or, 1/2, </i>, R(x)/G(x)", "a / b, and/or, 1/2, </i>, R(x)/G(x)"),
    ],
)  # fmt: skip
def test_a_visitor_sees_no_path(text, expected, monkeypatch):
    monkeypatch.setenv("IDAA_OUTPUTS", "/tmp/our outputs")
    monkeypatch.setenv("IDAA_DATA", "/my data & more")
    monkeypatch.setenv("HOME", "/home/anna marie")
    monkeypatch.setattr(Path, "cwd", lambda: Path("/repo dir"))
    assert hide_paths(text) == expected
    assert hide_paths(expected) == expected


def test_visitors_read(outputs):
    broken_run = made(VAEConfig(dataset="/srv/private/x.zip", seed=1), {})
    (broken_run.path / "config.json").write_text("{")
    failed_run = made(VAEConfig(seed=2), error="There is no /srv/private/y.zip.")
    judge = made(EvalConfig(run="/srv/private/ssl-gone"), judgement(40.0))
    vaes = [
        made(VAEConfig(dataset=f"/srv/private/{name}.zip", seed=seed), {})
        for seed, name in enumerate("ab", 3)  # equal images of one seed would be one run
    ]
    (vaes[0].path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n')
    page = RunsPage(read_only=True)
    pick(page, broken_run, failed_run, judge, *vaes)

    def widgets_of(widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from widgets_of(child)

    widgets = [*widgets_of(page.ui)]
    state = str([widget.get_state() for widget in widgets])
    assert str(outputs) not in state and "/srv" not in state
    assert texts(page)[failed_run.id]["result"] == "There is no …/y.zip."
    assert page.status.value == ""
    assert "no curves" in page.curves.value and "a.zip" in page.diff.value
    acts = page.open, page.watch, page.resume, page.delete, page.tag, page.tags, page.yes, page.no
    assert not {*widgets} & {*acts}
    assert all(act.comm is None for act in acts)  # nor can a message press one
    empty_page = RunsPage(read_only=True)
    assert str(outputs) not in empty_page.head.value


def test_a_torn_log_is_a_sentence_and_the_others_are_drawn(outputs):
    lines = [{"step": s, "loss": 9 - s, "epoch": 0} for s in range(3)]
    torn_run, whole_run = (made(VAEConfig(seed=s), {}, lines=lines) for s in (0, 1))
    log = torn_run.path / "metrics.jsonl"
    log.write_text(log.read_text()[:-9] + log.read_text())
    page = RunsPage()
    pick(page, torn_run, whole_run)
    assert page.status.value == "" and page.curves.value.count("<svg") == 1
    assert f"{torn_run.id} has no curves" in page.curves.value


def test_curves_and_accuracies_of_the_chosen(outputs):
    lines = [{"step": s, "loss": 9 - s, "epoch": 0} for s in range(3)]
    one, two = (made(SSLConfig(seed=s), {"knn_top1_val": 1.0}, lines=lines) for s in (0, 1))
    references = {f"random_{key}": value for key, value in judgement(20.0).items()}
    made(EvalConfig(run=one.id), judgement(40.04) | references)
    made(EvalConfig(run=two.id), judgement(50.06))
    made(EvalConfig(run=two.id, protocol="official"), judgement(60.0, 96, "official: z"))
    page = RunsPage()
    pick(page, one, two)
    assert page.status.value == ""
    assert page.curves.value.count("<svg") == 1
    assert "seed = 0" in page.curves.value and "seed = 1" in page.curves.value
    tables = page.accuracy.value.split("<h4>")[1:]
    (clean_table,) = [t for t in tables if "clean: backbone" in t]
    (official_table,) = [t for t in tables if "official: z" in t]
    for text in (
        "40.04 [36.04, 44.04]", "50.06 [46.06, 54.06]", "20.00 [16.00, 24.00]", "100 test images",
        "untrained encoder",
    ):  # fmt: skip
        assert text in clean_table and text not in official_table
    assert "60.00 [56.00, 64.00]" in official_table and "60.00" not in clean_table


def test_deleting_asks_first_and_says_who_uses_it(outputs):
    vae = made(VAEConfig(), {})
    user = made(SSLConfig(adversary="idaa", vae=vae.id), {})
    page = RunsPage()
    pick(page, vae)
    page.delete.click()
    assert page.confirm.layout.display == ""
    assert "Delete 1 run, 0.0 MiB? 1 other run uses it." in page.question.value
    page.no.click()
    assert page.confirm.layout.display == "none"
    page.delete.click()
    pick(page, vae, user)  # another choice is another question
    assert page.confirm.layout.display == "none"
    page.delete.click()
    assert "Delete 2 runs, 0.0 MiB?</b>" in page.question.value
    page.yes.click()
    assert runs.list_runs() == [] and texts(page) == {} and page.picked == []
    assert "freed" in page.status.value


def test_buttons_offer_what_the_run_allows(outputs, going):
    stopped_run, finished_run = made(VAEConfig(seed=1)), made(VAEConfig(seed=2), {})
    page = RunsPage()

    def enabled_buttons(*selection):
        pick(page, *selection)
        buttons = ("open", "watch", "resume", "delete")
        return {name for name in buttons if not getattr(page, name).disabled}

    assert enabled_buttons() == set()
    assert enabled_buttons(going) == {"open", "watch"}
    assert enabled_buttons(stopped_run) == {"open", "resume", "delete"}
    assert enabled_buttons(finished_run) == {"open", "delete"}
    assert enabled_buttons(stopped_run, finished_run) == {"open", "delete"}
    assert enabled_buttons(stopped_run, going) == {"open"}


def test_resume_starts_the_run_and_shows_its_panel(outputs):
    run = train_vae(VAEConfig(**TINY, dim=8))
    (run.path / "summary.json").unlink()
    (run.path / "state.json").write_text('{"state": "interrupted"}')
    page = RunsPage()
    pick(page, run)
    page.resume.click()
    assert page.status.value == ""
    assert "idaa-live" in page.live.children[0]._dom_classes
    deadline = time.monotonic() + 90
    while not run.finished and time.monotonic() < deadline:
        time.sleep(0.2)
    page.close()
    for child in process._children.values():
        child.wait(60)
    assert run.finished


def test_a_notebook_is_made_with_the_run_s_parameters(outputs):
    run = made(SSLConfig(adversary="clae", epsilon=0.05), {})
    page = RunsPage()
    pick(page, run)
    page.open.click()
    assert str(run.path / "notebook.ipynb") in html.unescape(page.links.value)  # no server here
    cells = nbformat.read(run.path / "notebook.ipynb", 4).cells
    (cell,) = [c for c in cells if "injected-parameters" in c.metadata.get("tags", [])]
    names = {}
    exec(cell.source, names)
    del names["__builtins__"]
    assert SSLConfig(**names) == run.config
    assert "Train an encoder" in cells[0].source
    (run.path / "notebook.ipynb").write_text("executed")
    assert notebook.notebook_of(run).read_text() == "executed"  # what is there stays


def test_a_link_is_of_this_kernel_s_own_server(outputs, monkeypatch):
    run = made(VAEConfig(), {})
    path = run.path / "notebook.ipynb"
    servers = [
        {"pid": 1, "root_dir": str(outputs), "base_url": "/other/"},
        {"pid": 22, "root_dir": str(outputs.parent), "base_url": "/hub user/"},
    ]
    import jupyter_server.serverapp as app

    monkeypatch.setattr(app, "list_running_servers", lambda: iter(servers))
    monkeypatch.setenv("JPY_PARENT_PID", "22")
    assert f'href="/hub user/lab/tree/outputs/vae/{run.id}/' in notebook.link(run, path)
    monkeypatch.setenv("SERVER_SOFTWARE", "voila/0.5")
    assert "href" not in notebook.link(run, path)
    monkeypatch.delenv("SERVER_SOFTWARE")
    servers[1]["root_dir"] = "/elsewhere"
    assert "href" not in notebook.link(run, path)


def test_an_error_in_a_callback_is_seen(outputs):
    page = RunsPage()
    assert guard(page.status)(lambda: 1)() == 1

    @guard(page.status)
    def act():
        raise RunError("<nothing> there")

    act()
    assert page.status.value == "<b>&lt;nothing&gt; there</b>"
    guard(page.status)(lambda: 1 / 0)()
    assert "ZeroDivisionError" in page.status.value


def test_without_runs_it_says_what_to_run_first(outputs):
    page = RunsPage()
    assert "01_pretrain_vae.ipynb" in page.head.value
    assert page.status.value == ""


def test_the_start_notebook_runs_headless(outputs, tmp_path):
    from idaa_lib import sweeps

    path = sweeps.execute("00_start_here", {}, tmp_path / "out.ipynb")
    assert "idaa" in json.dumps(nbformat.read(path, 4)) and path.exists()
