"""Makes .venv from the lock files, or finds it made: `python3 scripts/env.py runtime|test`.

`runtime` installs what requirements.lock names and sva itself (editable); `test` installs the test tools and
torch as well. The file .venv/sva-env.json keeps a hash of all that each of the two is made from, so a second
call ends at once, while an interrupted one, or one after a lock file has changed, installs what is missing.
Needs nothing but Python, and one too old for sva still runs it as far as the line that says so.
"""

import hashlib
import importlib.util
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

OLDEST = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "sva-env.json"
LOG = VENV / "install.log"
SELF = ("sva", ["--no-deps", "--editable", "."])
STEPS = {
    "runtime": [("the packages of requirements.lock", ["--require-hashes", "-r", "requirements.lock"]), SELF],
    "test": [
        ("the packages of requirements-test.lock", ["--require-hashes", "-r", "requirements-test.lock"]),
        ("torch, for the tests that compare with it", ["-r", "requirements-torch.txt"]),
        SELF,
    ],
}
MADE_FROM = {
    "runtime": ["pyproject.toml", "requirements.lock"],
    "test": ["pyproject.toml", "requirements.lock", "requirements-test.lock", "requirements-torch.txt"],
}


def fingerprints(version):
    """What each mode is made from, as a hash: the files, Python's version, where the checkout lies."""
    place = "\0".join([str(ROOT), version, platform.machine()])
    return {
        mode: hashlib.sha256(place.encode() + b"".join((ROOT / name).read_bytes() for name in names)).hexdigest()
        for mode, names in MADE_FROM.items()
    }


def venv_version():
    """Version of the Python in .venv; None where there is none that runs, has pip and is new enough."""
    probe = "import pip, platform, sys; print(platform.python_version()); sys.exit(sys.version_info < {})"
    try:
        command = [str(PYTHON), "-c", probe.format(OLDEST)]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return None
    return run.stdout.decode().strip() if run.returncode == 0 else None


def make_venv():
    """Creates .venv anew with the Python that runs this file."""
    version = platform.python_version()
    if sys.version_info < OLDEST:
        sys.exit(
            f"sva needs Python {OLDEST[0]}.{OLDEST[1]} or newer, and {sys.executable} is {version}: "
            "run again with PYTHON=/path/to/python3.12"
        )
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        sys.exit(
            f"{sys.executable} cannot make virtual environments: on Debian or Ubuntu run "
            "'apt-get install python3-venv', then this again"
        )
    print(f"making .venv with Python {version}", flush=True)
    if subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)]).returncode:
        sys.exit(f"making .venv failed, for the reason above: {ROOT} must be writable and its disk not full")
    return version


def install(what, arguments, log):
    """Runs pip with its output in `log` and, on a terminal, a count of packages."""
    print(f"installing {what} ...", flush=True)
    start, live, count, errors = time.monotonic(), sys.stdout.isatty(), 0, []
    pip = [
        str(PYTHON),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-input",
        "--progress-bar=off",
        "--no-compile",  # most of it is never imported; what is, Python compiles then
    ]
    process = subprocess.Popen(
        pip + arguments, cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        log.write(line)
        doing = None
        if line.startswith(("Collecting", "Processing")):
            count += 1
            doing = line.split()[1].rpartition("/")[2]
        elif line.startswith("Installing collected"):
            doing = "unpacking"
        elif line.startswith("ERROR"):
            errors.append(line.strip())
        if live and doing:
            print(f"\r  {count:3d}  {doing:<70.70}", end="", flush=True)
    if live:
        print("\r" + " " * 78 + "\r", end="")
    if process.wait():
        for line in errors[-5:]:
            print("  " + line, file=sys.stderr)
        sys.exit(f"installing {what} failed: see {LOG} (is the package index reachable, is the disk full?)")
    print(f"  {count} packages, {time.monotonic() - start:.0f} s", flush=True)


def main(mode):
    """Makes or completes the environment for `mode`."""
    version = venv_version() or make_venv()
    wanted = fingerprints(version)
    found = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    # What `test` installs includes what `runtime` does.
    if any(found.get(made) == wanted[made] for made in (mode, "test")):
        return
    if STAMP.exists():
        STAMP.unlink()
    with LOG.open("w") as log:
        for what, arguments in STEPS[mode]:
            install(what, arguments, log)
    STAMP.write_text(json.dumps({made: wanted[made] for made in (mode, "runtime")}, indent=1))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        sys.exit("interrupted: run again to resume")
