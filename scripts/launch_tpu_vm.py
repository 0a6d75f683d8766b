"""A Cloud TPU VM for scripts/launch.py: gcloud's commands for it, and this checkout on its workers."""

import os
import shlex
import subprocess
import sys
import tarfile

RUNTIMES = {  # Google's runtimes for PyTorch and JAX, by the beginning of an accelerator type
    **dict.fromkeys(("v2", "v3", "v4"), "tpu-ubuntu2204-base"),
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
GONE = ("PREEMPTED", "TERMINATED")  # states of a pod that is to be deleted and made again

ENVIRONMENT = "sva-run.env"  # the file of variables, in a worker's home
CHECKOUT = "sva-run.tar.gz"  # the files of the checkout, there too

# The runtimes' own Python is too old for sva; uv brings one. What runs have written into the folder stays.
INSTALL = (
    f"mkdir -p sva-run && rm -rf sva-run/.venv sva-run/sva && tar -xzf {CHECKOUT} -C sva-run && cd sva-run && "
    "PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv && "
    "python3 -m uv venv --quiet --python 3.12 && python3 -m uv pip install --quiet '.[tpu]'"
)

# Left over from a run that broke off, a process would hold the chips; one that waits for a lost process does not heed
# SIGTERM. The brackets keep the pattern from matching the shell that is given it.
LEFT_OVER = "'[s]va-run/.venv/bin/python'"
CLEAR = f"pkill --full {LEFT_OVER} && sleep 30 && pkill --signal KILL --full {LEFT_OVER}"


class Pod:
    """gcloud's commands for one Cloud TPU VM, and whether this checkout is installed on its workers."""

    def __init__(self, arguments, command):
        self.vm = ["gcloud", "compute", "tpus", "tpu-vm"]
        self.name, self.zone = arguments.name, f"--zone={arguments.zone}"
        where = [self.name, self.zone]
        on_workers = [*self.vm, "ssh", *where, "--worker=all", "--command"]
        kind = [f"--accelerator-type={arguments.type}", f"--version={arguments.version}"]
        self.create = [*self.vm, "create", *where, *kind, *(["--spot"] if arguments.spot else [])]
        self.describe = [*self.vm, "describe", *where, "--format=value(state)"]
        self.delete = [*self.vm, "delete", *where, "--quiet"]
        self.install = [*on_workers, INSTALL]
        # Variables are set from a file that no worker keeps.
        given = f"set -a; . ./{ENVIRONMENT}; set +a; rm {ENVIRONMENT}; " if arguments.env else ""
        run = f"cd sva-run && SVA_DISTRIBUTED=1 {shlex.join(['.venv/bin/sva', *command[1:]])}"
        self.run = [*on_workers, f"{CLEAR}; {given}{run}"]
        self.is_installed = False

    def hand_on(self, path, name):
        """The command that copies a file to every worker's home, under this name."""
        return [*self.vm, "scp", str(path), f"{self.name}:{name}", self.zone, "--worker=all"]

    def state(self):
        """The pod's state, e.g. READY or PREEMPTED; NOT_FOUND where there is none, nothing where gcloud cannot say."""
        found = subprocess.run(self.describe, capture_output=True, text=True)
        if not found.returncode:
            return found.stdout.strip()
        if ") NOT_FOUND:" in found.stderr:
            return "NOT_FOUND"
        print(found.stderr, end="", file=sys.stderr)
        return ""

    def prepare(self, checkout):
        """0 once the pod is there and this archive is installed on every worker; else the code of the step that failed.

        It is made where there is none. One that is being made, repaired or stopped is let be, and so is one whose state
        is not known.
        """
        found = self.state()
        if found in GONE:
            subprocess.run(self.delete)
            found = "NOT_FOUND"
        if found == "NOT_FOUND":
            self.is_installed = False
            if code := subprocess.run(self.create).returncode:
                return code
        elif found != "READY":
            print(f"launch: {self.name} is {found or 'in a state that is not known'}, not READY", file=sys.stderr)
            return 1
        for step in () if self.is_installed else (self.hand_on(checkout, CHECKOUT), self.install):
            if code := subprocess.run(step).returncode:
                return code
        self.is_installed = True
        return 0


def listing(source):
    """The command that lists a checkout's files: those that git knows, and new ones that it does not ignore."""
    return ["git", "-C", source, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--exclude=.venv"]


def pack(source, file):
    """Writes those files into a tar archive; what is wrong, in a line, or None."""
    found = subprocess.run(listing(source), capture_output=True, text=True, errors="surrogateescape")
    if found.returncode:
        return f"--source {source} cannot be copied ({found.stderr.partition(chr(10))[0]}); name a git checkout of sva"
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name in filter(None, found.stdout.split("\0")):
            path = os.path.join(source, name)
            if os.path.lexists(path):  # git also lists what was deleted and not committed
                archive.add(path, name, recursive=False)
    file.flush()
    return None
