"""Rules of the project itself: who imports whom, what notebooks hold, what set-up installs."""

import ast
import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from detect import DetectionConfig
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from papermill import inspect_notebook

import idaa_lib.__main__
import idaa_lib.data.__main__
import idaa_lib.train.__main__
from idaa_lib import data, runs, train
from idaa_lib.configs import (
    CompareConfig,
    DecomposeConfig,
    EvalConfig,
    SemiConfig,
    SSLConfig,
    SweepConfig,
    SystemsConfig,
    TheoryConfig,
    TransferConfig,
    VAEConfig,
)

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = sorted((ROOT / "notebooks" / "app").glob("*.ipynb"))
CONFIGS = {
    "01_pretrain_vae": VAEConfig,
    "02_decompose": DecomposeConfig,
    "03_train_ssl": SSLConfig,
    "04_evaluate": EvalConfig,
    "05_sensitivity": SweepConfig,
    "06_compare_methods": CompareConfig,
    "07_semi_supervised": SemiConfig,
    "08_identity_theory": TheoryConfig,
    "10_detection": DetectionConfig,
    "09_transfer": TransferConfig,
    "11_identity_preserving_methods": SystemsConfig,
    "12_your_own_method": SSLConfig,
}
OWN = "12_your_own_method"
DONE = subprocess.CompletedProcess([], 0, "")
CORE = {"registry", "configs", "data", "views", "nets", "runs"}
ROOMS = {
    "registry": set(),
    "configs": {"registry", "nets"},
    "data": set(),
    "views": set(),
    "nets": {"registry"},
    "runs": {"configs", "data", "nets"},
    "adversaries": {"registry", "configs", "nets", "views"},
    "methods": {"registry", "configs", "nets", "views"},
    "evaluate": CORE | {"methods"},
    "identity": CORE | {"methods", "adversaries", "evaluate"},
    "train": CORE | {"methods", "adversaries", "evaluate", "identity"},
    "results": {"configs", "runs", "methods", "evaluate"},
    "grids": {"configs", "runs", "evaluate"},
    "kernels": {"runs"},
    "plans": {"configs", "runs", "train", "evaluate", "results", "grids", "kernels"},
    "sweeps": {"configs", "runs", "results", "grids", "kernels", "plans"},
    "interop": CORE | {"methods", "evaluate", "train"},
    "lab": CORE
    | {"methods", "adversaries", "evaluate", "identity", "train", "results"}
    | {"grids", "kernels", "plans", "sweeps"},
}


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "idaa_lib":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("idaa_lib."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("idaa_lib."))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_the_map_allows(room):
    files = [*(ROOT / "idaa_lib" / room).rglob("*.py"), ROOT / "idaa_lib" / f"{room}.py"]
    rooms = {other for path in files if path.exists() for other in imported_rooms(path)}
    assert rooms <= ROOMS[room] | {room}


def test_the_map_knows_every_room():
    files = {p.stem for p in (ROOT / "idaa_lib").iterdir() if p.suffix == ".py"}
    folders = {p.parent.name for p in (ROOT / "idaa_lib").glob("*/__init__.py")}
    assert (files | folders) - {"__init__", "__main__"} == set(ROOMS)


@pytest.mark.parametrize("root", ["idaa_lib", "examples", "benchmarks"])
def test_text_is_utf_8_whatever_the_locale(root):
    """A call that reads or writes text names its encoding: else the system's would decide."""
    for path in (ROOT / "bootstrap.py", *(ROOT / root).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(call, ast.Call):
                name = ast.unparse(call.func).rpartition(".")[2]
                words = [ast.unparse(each) for each in (*call.args, *call.keywords)]
                text = name in ("read_text", "write_text") or "text=True" in words
                file = name in ("open", "fdopen") and re.search(r"'[rwax]\+?t?'", " ".join(words))
                if text or file or ast.unparse(call.func) == "open":
                    encoding = re.search(r"utf-8|'[rwax]?\+?b", " ".join(words))
                    assert encoding, (path.name, call.lineno, ast.unparse(call))


def test_the_core_imports_without_the_lab():
    """What a cluster node needs: no Jupyter, no papermill, no plotting."""
    lab = ("papermill", "jupyterlab", "ipywidgets", "matplotlib", "seaborn", "pandas", "joblib")
    hide = f"import sys\nfor name in {lab!r}: sys.modules[name] = None\n"
    code = hide + "import idaa_lib, idaa_lib.sweeps"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_environment_yml_cannot_drift_from_pyproject():
    """It names no dependency of its own: python, pip, make, and the project with its extras."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert conda == [f"python{project['requires-python']}", "pip", "make"]
    (extras,) = pip["pip"]
    assert extras == "-e .[lab,dev]"
    assert set(project["optional-dependencies"]) >= {"lab", "dev"}


@pytest.mark.parametrize("path", [*NOTEBOOKS, *PAGES], ids=lambda p: p.stem)
def test_a_notebook_is_stripped_and_named_for_any_kernel(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert not {"papermill", "widgets"} & notebook["metadata"].keys()
    for cell in notebook["cells"]:
        assert "papermill" not in cell["metadata"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def cells_of(stem):
    return json.loads((ROOT / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf-8"))["cells"]


def recipe_values(config, name):
    """What stands in [] behind a parameter: its value by each recipe that is meant for all."""
    presets: dict[str, list[str]] = {}
    for preset in ("demo", "cifar10", "paper"):
        if (config.recipes / f"{preset}.toml").exists():
            value = getattr(config(preset=preset), name)
            parts = value if isinstance(value, tuple) else ("all" if value is None else value,)
            text = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in parts)
            presets.setdefault(text, []).append(preset)
    each = ["/".join(names) + ": " + text for text, names in presets.items()]
    return "; ".join(each) if len(each) > 1 else text


@pytest.mark.parametrize("stem", CONFIGS)
def test_a_notebook_s_parameters_are_few_and_papermill_explains_each(stem):
    """At most 20, which give the configuration's own defaults; each has a type, a meaning and the
    recipes' values. Fields that are not among them stand in a table of the notebook."""
    config, cells = CONFIGS[stem], cells_of(stem)
    (cell,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    source, names = "".join(cell["source"]), dict[str, Any]()
    assert source.startswith("# Parameters: ")  # how `from_notebook` knows it
    exec(source, names)
    names = {k: v for k, v in names.items() if not k.startswith("__")}
    assert len(names) <= 20
    help = inspect_notebook(ROOT / "notebooks" / f"{stem}.ipynb")  # what --help-notebook prints
    assert help.keys() == names.keys()
    for name, entry in help.items():
        kind, (text, _, values) = entry["inferred_type_name"], entry["help"].partition(" [")
        assert kind != "None" and len(text) > 5, name
        if names[name] is None and getattr(config(), name, None) not in (None, "", (), {}):
            assert kind == "dict" or values == recipe_values(config, name) + "]", name
    if stem == OWN:  # the knobs that its own file registers are there too
        names = {k: v for k, v in names.items() if k in config.model_fields}
        assert config(**names | {"method": "simclr", "adversary": "idaa"}).limit == names["limit"]
        return
    assert config(**names) == config()
    table = f"{config.__name__}.fields()" in "".join("".join(c["source"]) for c in cells)
    assert table or names.keys() == config.model_fields.keys()


@pytest.mark.parametrize("stem", [stem for stem in CONFIGS if stem != OWN])
def test_a_notebook_s_parameters_leave_every_recipe_as_it_is(stem):
    """`papermill … -p preset rsa-cifar100` is RSA: no value of the cell wins over a recipe's."""
    names, config = dict[str, Any](), CONFIGS[stem]
    (cell,) = [c for c in cells_of(stem) if "parameters" in c["metadata"].get("tags", [])]
    exec("".join(cell["source"]), names)
    names = {k: v for k, v in names.items() if not k.startswith("__")}
    for path in config.recipes.glob("*.toml"):
        own = {"preset": path.stem}
        if "size" in config.model_fields and stem in ("01_pretrain_vae", "03_train_ssl"):
            own["dataset"] = "/data/photographs"  # no recipe names ImageNet's
        assert config(**names | own) == config(**own), path.stem


@pytest.mark.parametrize("stem", CONFIGS)
def test_a_notebook_says_what_it_computes_as_a_formula(stem):
    texts = ["".join(c["source"]) for c in cells_of(stem) if c["cell_type"] == "markdown"]
    formulas = re.findall(r"(?s)\n\n\$\$(.+?)\$\$", "\n".join(texts))
    assert formulas
    assert all(text.count("{") == text.count("}") for text in formulas)
    assert all(text.count("$") % 2 == 0 for text in texts)


@pytest.mark.parametrize("config", [*CONFIGS.values()], ids=lambda config: config.stage)
def test_each_field_and_knob_has_a_meaning(config):
    rows = config.fields()
    assert {row["name"] for row in rows} >= config.model_fields.keys()
    assert [row["name"] for row in rows if len(row["meaning"]) < 8] == []


def test_make_lab_opens_the_first_notebook_without_news():
    command = ["make", "-n", "--no-print-directory", "lab", f"ENV={sys.prefix}"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb" in process.stdout
    assert f'JUPYTER_CONFIG_PATH="{ROOT}/notebooks' in process.stdout
    path = ROOT / "notebooks" / "labconfig" / "default_setting_overrides.json"
    (notification,) = json.loads(path.read_text()).values()
    assert notification["fetchNews"] == "false"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_tells_a_story_and_keeps_its_cells_short(path):
    cells = json.loads(path.read_text())["cells"]
    assert "".join(cells[0]["source"]).startswith("# ")
    assert "What to try next" in "".join(cells[-1]["source"])
    for cell in cells:
        if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", []):
            assert len(cell["source"]) <= 15
            assert not any("class " in line or "def " in line for line in cell["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_cuts_no_protocol_off(path):
    """pandas cuts cells after 50 characters unless it is told not to."""
    cells = json.loads(path.read_text())["cells"]
    code = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    shows = code.find("SHOWN]")
    assert shows < 0 or 0 <= code.find('pd.set_option("display.max_colwidth", None)') < shows


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_of_a_page_lead_to_files(path):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_python_of_a_page_names_only_what_it_has(path):
    """Its blocks, one after another."""
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text("utf-8"), re.M | re.S)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F821", "-"]
    process = subprocess.run(command, input="\n".join(blocks), capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_every_verb_of_the_makefile_is_in_its_help():
    process = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for verb in (
        "demo",
        "test",
        "lab",
        "app",
        "report",
        "browser",
        "bench",
        "profile",
        "compare",
        "setup",
        "format",
    ):
        assert f"\n{verb} " in f"\n{process.stdout}"


def test_each_command_explains_itself(capsys):
    """At any place, on stdout, with status 0; a stage with all its fields, the import with its
    arguments. A command that lacks its words explains itself too, on stderr, with status 2."""
    commands = {
        idaa_lib.__main__: ["", "import"],
        train.__main__: ["", *train.__main__.STAGES],
        data.__main__: ["", "shard", "clean"],
    }
    for command, verbs in commands.items():
        for verb, flag in itertools.product(verbs, ("-h", "--help")):
            assert command.main([*verb.split(), flag]) == 0
            out, err = capsys.readouterr()
            assert out.startswith(command.__doc__)
            assert not err
            for row in runs.CONFIGS[verb].fields() if command is train.__main__ and verb else ():
                assert re.search(rf"^{row['name']}\b.*: ", out, re.M)
            assert verb != "import" or "condition" in out
        assert command.main([]) == 2
        assert capsys.readouterr() == ("", f"{command.__doc__}\n")


def test_the_lock_file_names_a_version_of_each_package_that_fits_its_range():
    """No build of torch and no library of CUDA: those are the machine's own choice."""
    lines = (ROOT / "requirements.lock").read_text("utf-8").split()
    versions = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
    assert not [line for line in lines if re.search(r"\+|^(nvidia|cuda|triton)", line)]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    for text in (*project["dependencies"], *extras["lab"], *extras["dev"], *extras["onnx"]):
        need = Requirement(text)
        if need.name != "idaa_lib":
            assert need.specifier.contains(versions[canonicalize_name(need.name)]), text


def test_set_up_with_a_lock_file_takes_its_versions_once(tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT))
    import bootstrap

    calls = []
    monkeypatch.setattr(bootstrap, "run", lambda command, **_: calls.append(command) or DONE)
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").touch()
    lock = tmp_path / "a.lock"
    lock.write_text("torch==2.14.1\n", "utf-8")
    installs = []
    for words in ([], [], [lock], [lock], []):
        bootstrap.main(tmp_path / "env", *words)
        installs.append(sum("install" in command for command in calls))
    assert installs == [1, 1, 2, 2, 2]  # what is there serves who asks for no versions
    (command,) = [c for c in calls if lock in c]
    assert command[-2:] == ["-c", lock]
    with pytest.raises(SystemExit, match=r"there is no file other\.lock"):
        bootstrap.main(tmp_path / "env", "other.lock")


def test_set_up_says_what_failed_and_what_to_do(tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT))
    import bootstrap

    for log, what, advice in (
        ("ERROR: [Errno 28] No space left on device", "disk is full", "free some space"),
        ("WARNING: Retrying after NewConnectionError\nERROR: No matching distribution found for x",
         "could not reach the package index", "PIP_INDEX_URL"),
        ("ERROR: Failed building wheel for x", "Failed building wheel", "see the lines above"),
    ):  # fmt: skip
        diagnosis = bootstrap.diagnosis(log)
        assert what in diagnosis[0]
        assert advice in diagnosis[1]
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit, match=r"3\.11 or newer is needed"):
        bootstrap.main(tmp_path / "env")
    monkeypatch.undo()
    usage = bootstrap.shutil._ntuple_diskusage(10**9, 10**9, 10**6)
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit, match="GiB free"):
        bootstrap.main(tmp_path / "env")
    assert not (tmp_path / "env").exists()
