"""Make the environment that `make demo` and `make test` run in; standard library only.

`python bootstrap.py ENV [LOCK]` installs this project with its extras into ENV (made if it is
missing), of packages that the file LOCK names the versions there, and leaves a stamp, so that a
second run takes no time until pyproject.toml, or LOCK where it is given, changes.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
OLDEST = (3, 11)
GIBIBYTES = 9  # 5.4 of torch with its CUDA libraries, the rest, and room to unpack a wheel


def fail(what, advice):
    sys.exit(f"\nSet-up failed: {what}\n  What to do: {advice}\n")


def main(env, lock=None):
    sys.stdout.reconfigure(errors="replace")  # of a console that cannot show all that is printed
    if sys.version_info < OLDEST:
        fail(
            f"this is Python {sys.version.split()[0]}, and 3.11 or newer is needed.",
            "install a newer Python (python.org, conda, apt), then: make PYTHON=python3.12 …",
        )
    env = Path(env).resolve()
    python = env / "bin" / "python"
    if python.exists():
        old = run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode
        if old:
            fail(f"the Python of {env} is too old.", "use an environment with 3.11 or newer.")
    stamp = env / "idaa_lib.stamp"
    # Where the project lies counts too: the installation is editable, and points to it.
    wanted = hashlib.sha256((HERE / "pyproject.toml").read_bytes() + bytes(HERE)).hexdigest()
    if lock:
        if not Path(lock).is_file():
            fail(f"there is no file {lock}.", "LOCK=requirements.lock is the one that ships here.")
        wanted += " " + hashlib.sha256(Path(lock).read_bytes()).hexdigest()
    done = stamp.read_text("utf-8") if python.exists() and stamp.exists() else ""
    if wanted in (done, done.partition(" ")[0]):
        return
    room = env if env.exists() else HERE
    free = shutil.disk_usage(room).free / 2**30
    if free < GIBIBYTES and not python.exists():
        fail(
            f"{room} has {free:.1f} GiB free, and PyTorch with its parts needs {GIBIBYTES}.",
            "free some space, or clone to a larger disk.",
        )
    began = time.monotonic()
    print(f"Setting up {env} (once; 2 to 10 minutes, mostly the download of PyTorch) …", flush=True)
    if not python.exists() and run([sys.executable, "-m", "venv", env]).returncode:
        fail(
            f"python -m venv {env} did not work.",
            "on Debian and Ubuntu: apt install python3-venv; else use conda: "
            "conda env create -f environment.yml && conda activate idaa",
        )
    install = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    versions = ["-c", lock] if lock else []
    done = run([*install, "-e", f"{HERE}[lab,dev]", *versions], show=True)
    if done.returncode:
        fail(*diagnosis(done.stdout))
    stamp.write_text(wanted, "utf-8")
    print(f"The environment is ready ({time.monotonic() - began:.0f} s).", flush=True)


def run(command, show=False):
    """Run, and keep the output; with `show`, print one line for each package as it comes."""
    process = subprocess.Popen(
        [os.fspath(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if show and line.lstrip().startswith(("Collecting", "Downloading", "Installing", "ERROR")):
            print("  " + line.strip()[:110], flush=True)
    return subprocess.CompletedProcess(command, process.wait(), "".join(lines))


def diagnosis(log):
    """The reason that pip's log gives, and what helps."""
    if "No space left" in log:
        return "the disk is full.", "free some space and run the same command again."
    network = ("NewConnectionError", "Name or service", "timed out", "ProxyError", "SSLError")
    if any(word in log for word in network) or "No matching distribution found" in log:
        return (
            "pip could not reach the package index.\n  " + last(log, "ERROR"),
            "check the network, or set PIP_INDEX_URL or HTTPS_PROXY; then run it again.",
        )
    return "pip could not install the packages.\n  " + last(log, "ERROR"), "see the lines above."


def last(log, word):
    lines = [line.strip() for line in log.splitlines() if word in line]
    return lines[-1] if lines else log.strip().splitlines()[-1]


if __name__ == "__main__":
    main(*sys.argv[1:] or [".venv"])
