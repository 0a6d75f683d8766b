#!/usr/bin/env python3
"""Starts one `sva` command on every host of a pod, and again after a preemption: Cloud TPU VMs, GKE, SLURM.

    scripts/launch.py tpu-vm --name POD --zone ZONE --type v5litepod-16 -- train CONFIG.yaml run_dir=gs://...
    scripts/launch.py gke --name RUN --image IMAGE --topology 4x4 --type tpu-v5-lite-podslice -- train CONFIG.yaml
    scripts/launch.py slurm --name RUN --nodes 4 -- train CONFIG.yaml

With --dry-run it prints what it would do, ready to be run by hand, and touches nothing. What follows `--` is an `sva`
command; every host runs the same, finds the others by `jax.distributed`, and process 0 writes. A run saves after every
step and resumes from there, so a restart is the same command again, on as many hosts as there are then: a host that is
lost ends the others, and the pod, the job set or the batch job starts them all anew, `--restarts` times at most.
Exit code 2 (the user's mistake) is never tried again.

HF_TOKEN, SVA_SPECTRA, SVA_DATA, SVA_CACHE and SVA_COMPILED are handed on where they are set here, and so is what
--env NAME names. What holds a path of this machine goes to SLURM's nodes alone, which have its files; elsewhere only
--env hands it on. Only names are printed, written or given as arguments. Values travel in SLURM's own export of the
environment, in a Secret of Kubernetes, or in a file of mode 600 that each worker reads and removes.

Needs nothing but Python, and gcloud with git, kubectl or sbatch.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time

from launch_tpu_vm import CHECKOUT, ENVIRONMENT, GONE, RUNTIMES, Pod, listing, pack

USUAL = ("HF_TOKEN", "SVA_SPECTRA", "SVA_DATA", "SVA_CACHE", "SVA_COMPILED")  # handed on where they are set
PROGRAMS = ("gcloud", "git", "kubectl", "sbatch")
CHIPS_A_HOST = {"tpu-v4-podslice": 4, "tpu-v5-lite-podslice": 4, "tpu-v5p-slice": 4, "tpu-v6e-slice": 4}

# JAX's runtime aborts the other processes of a run when one is lost, with a stack trace and no word from Python.
LOST = (
    "a process was ended by a signal, most likely because another one of the run was lost (a report is above); a "
    "training run resumes after its last saved step"
)

# Runs its arguments, hands SIGTERM on to them, and says so where a signal ended them. `wait` also returns when a signal
# arrives, with its number and the command still there.
WATCHED = f"""\
"$@" & run=$!
trap 'kill -TERM $run' TERM
wait $run; code=$?
while kill -0 $run 2>/dev/null; do wait $run; code=$?; done
if [ "$code" -gt 128 ] && [ "$code" -le 192 ]; then echo {shlex.quote(f"launch: {LOST}")} >&2; fi
exit "$code"
"""


def main(argv=None):
    """Runs the launcher; its exit code is that of the run."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--" not in words:
        words.append("--")
    cut = words.index("--")
    arguments = parser().parse_args(words[:cut])
    command = words[cut + 1 :]
    if not command:
        return fail("nothing to run: write an sva command after --, e.g. -- train configs/smollm2-largest.yaml")
    if arguments.restarts < 0:
        return fail(f"--restarts {arguments.restarts} must be at least 0")
    if problem := environment_problem(arguments.env):
        return fail(problem)
    arguments.env = list(dict.fromkeys([*usual(arguments), *arguments.env]))
    try:
        return arguments.run(arguments, ["sva", *command])
    except FileNotFoundError as error:
        if error.filename not in PROGRAMS:
            raise
        return fail(
            f"{error.filename} is not on this machine; run this where it is, or add --dry-run to see what would be done"
        )


def parser():
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    places = top.add_subparsers(required=True, metavar="PLACE")
    everywhere = argparse.ArgumentParser(add_help=False)
    everywhere.add_argument("--name", required=True, help="of the pod, or of the run")
    everywhere.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    everywhere.add_argument("--restarts", type=int, default=20, help="after a preemption (default: %(default)s)")
    everywhere.add_argument(
        "--env",
        metavar="NAME",
        action="append",
        default=[],
        help=f"a variable to hand on as well, may be repeated; by itself, where it is set: {', '.join(USUAL)}",
    )

    sub = places.add_parser(
        "tpu-vm", parents=[everywhere], help="all workers of a Cloud TPU VM, made where it is missing"
    )
    sub.add_argument("--zone", required=True)
    sub.add_argument("--type", required=True, help="accelerator type, e.g. v5litepod-16")
    sub.add_argument("--version", help=f"of the runtime (default: by the type, of {', '.join(RUNTIMES)})")
    sub.add_argument("--spot", action="store_true", help="a machine that may be taken back, at a lower price")
    sub.add_argument("--source", default=".", help="git checkout that is copied to every worker (default: %(default)s)")
    sub.set_defaults(run=tpu_vm)

    sub = places.add_parser("gke", parents=[everywhere], help="a JobSet on a GKE cluster with a TPU node pool")
    sub.add_argument("--image", required=True, help="container image with sva and the extra `tpu` installed")
    sub.add_argument("--type", required=True, choices=sorted(CHIPS_A_HOST), help="the node pool's accelerator")
    sub.add_argument("--topology", required=True, help="of the slice, e.g. 4x4")
    sub.add_argument("--spot", action="store_true", help="on nodes that may be taken back")
    sub.set_defaults(run=gke)

    sub = places.add_parser(
        "slurm", parents=[everywhere], help="a batch job, one process a node, put back when preempted"
    )
    sub.add_argument("--nodes", type=int, default=1)
    sub.add_argument("--gpus", type=int, default=8, help="of a node (default: %(default)s)")
    sub.add_argument("--hours", type=int, default=24, help="of wall clock, after which it starts again")
    sub.add_argument("--partition")
    sub.set_defaults(run=slurm)
    return top


def usual(arguments):
    """Names of the variables that are handed on by themselves; those left out are said on stderr."""
    names = [name for name in USUAL if name in os.environ]
    if arguments.run is slurm:
        return names
    paths = [name for name in names if name != "HF_TOKEN" and "://" not in os.environ[name]]
    for name in paths:
        if name not in arguments.env:
            print(f"launch: {name} is a path of this machine and not handed on; --env {name} does", file=sys.stderr)
    return [name for name in names if name not in paths]


def environment_problem(names):
    """What is wrong with the names of --env, in a line that holds no value; None where nothing is."""
    for name in names:
        if "=" in name:
            return (
                f"--env takes a name alone, not {name.partition('=')[0]}=...: a value given there is read by everyone "
                "who lists processes; export it first"
            )
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            return f"--env {name!r} is not the name of an environment variable"
        if name not in os.environ:
            return f"--env {name} is not set here; export it first, or leave it out"
    return None


def values(names):
    """{name: value} of these environment variables.

    Raises:
      SystemExit: one of several lines, which no file of variables can hold.
    """
    for name in names:
        if "\n" in os.environ[name]:
            raise SystemExit(fail(f"{name} holds several lines, which cannot be handed on; put it into one"))
    return {name: os.environ[name] for name in names}


def tpu_vm(arguments, command):
    """Makes the pod, installs this checkout on every worker, runs; again when that fails or the pod was taken back."""
    arguments.version = arguments.version or RUNTIMES.get(arguments.type.rpartition("-")[0])
    if not arguments.version:
        known = ", ".join(f"{name}-N" for name in RUNTIMES)
        return fail(f"--type {arguments.type} has no known runtime ({known} have); name one with --version")
    pod = Pod(arguments, command)
    if arguments.dry_run:
        return show_pod(pod, arguments)
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in values(arguments.env).items()]
    code, pause = 1, 10
    with tempfile.NamedTemporaryFile(suffix=".tar.gz") as checkout:
        if problem := pack(arguments.source, checkout):
            return fail(problem)
        for attempt in range(arguments.restarts + 1):
            if attempt:
                time.sleep(pause)
            pause = min(2 * pause, 600)
            code = pod.prepare(checkout.name)
            if not code and (not lines or sent(pod, lines)):
                code, pause = subprocess.run(pod.run).returncode, 10
                if code in (0, 2):
                    break
            code = code or 1
            print(f"launch: exit code {code}, after {attempt} of {arguments.restarts} restarts", file=sys.stderr)
            if 128 < code <= 192:  # 255 is ssh's own, where the pod was taken back
                print(f"launch: {LOST}", file=sys.stderr)
    return code


def show_pod(pod, arguments):
    """Prints the steps of a pod's run, and does nothing."""
    show("make the pod, unless it is there", pod.create)
    print("# pack what git knows of the checkout, or does not ignore")
    print(f"{shlex.join(listing(arguments.source))} | ", end="")
    print(shlex.join(["tar", "-C", arguments.source, "--null", "-T", "-", "-czf", CHECKOUT]))
    show("copy that to every worker", pod.hand_on(CHECKOUT, CHECKOUT))
    show("install it", pod.install)
    if arguments.env:
        names = " ".join(arguments.env)
        print(f"# write {', '.join(arguments.env)} into a file that only you can read, hand it on, and remove it")
        print(f"(umask 077; for name in {names}; do printf '%s=%q\\n' $name \"${{!name}}\"; done > {ENVIRONMENT})")
        print(shlex.join(pod.hand_on(ENVIRONMENT, ENVIRONMENT)))
        print(f"rm {ENVIRONMENT}")
    show("run on every worker", pod.run)
    show(f"if that fails, up to {arguments.restarts} times: ask for its state; where it is READY run", pod.describe)
    show(f"where it is {' or '.join(GONE)} delete what is left, and where it is not there begin again", pod.delete)
    return 0


def sent(pod, lines):
    """Whether every worker was given the file of these variables; here it is removed."""
    with tempfile.NamedTemporaryFile("w", suffix=".env") as file:  # of mode 600
        file.writelines(lines)
        file.flush()
        return subprocess.run(pod.hand_on(file.name, ENVIRONMENT)).returncode == 0


def gke(arguments, command):
    """Applies a JobSet: one pod a host of the slice; when one fails all start again. One that has ended is replaced."""
    sides = [side for side in arguments.topology.split("x") if side.isdecimal()]
    if len(sides) != len(arguments.topology.split("x")) or not sides:
        return fail(f"--topology {arguments.topology} must be e.g. 4x4 or 2x2x4")
    chips = 1
    for side in sides:
        chips *= int(side)
    each = min(chips, CHIPS_A_HOST[arguments.type])
    manifest = json.dumps(jobset(arguments, command, chips // each, each), indent=2) + "\n"
    name = f"{arguments.name}-env"
    forget = ["kubectl", "delete", "secret", name, "--ignore-not-found"]
    keep = ["kubectl", "create", "secret", "generic", name, "--from-env-file=/dev/stdin"]
    held = 'jsonpath={.metadata.name} {.status.conditions[?(@.status=="True")].type}'
    there = ["kubectl", "get", "jobset", arguments.name, "--ignore-not-found", "--output", held]
    replace = ["kubectl", "delete", "jobset", arguments.name, "--cascade=foreground"]  # its pods too, before the new
    if arguments.dry_run:
        show("ask whether a job set of this name is there, and whether it is Completed or Failed", there)
        show("where it is either, delete it; where it is neither, end here", replace)
        if arguments.env:
            show(f"keep {', '.join(arguments.env)} in a Secret, which the job set names", forget)
            print(f"env | grep -E '^({'|'.join(arguments.env)})=' | {shlex.join(keep)}")
        print("# kubectl apply -f - (JSON is YAML)")
        print(manifest, end="")
        return 0
    lines = "".join(f"{name}={value}\n" for name, value in values(arguments.env).items())
    found = subprocess.run(there, stdout=subprocess.PIPE, text=True)
    if found.returncode:
        return 1
    if found.stdout and not {"Completed", "Failed"} & set(found.stdout.split()):
        return fail(f"the job set {arguments.name} has not ended; wait for it, or delete it with kubectl")
    if found.stdout and subprocess.run(replace).returncode:
        return 1
    if lines and (subprocess.run(forget).returncode or subprocess.run(keep, input=lines, text=True).returncode):
        return 1
    return subprocess.run(["kubectl", "apply", "-f", "-"], input=manifest, text=True).returncode


def jobset(arguments, command, hosts, chips):
    """The manifest. GKE tells every pod its number and all names (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES)."""
    selector = {
        "cloud.google.com/gke-tpu-accelerator": arguments.type,
        "cloud.google.com/gke-tpu-topology": arguments.topology,
    }
    container = {
        "name": "sva",
        "image": arguments.image,
        "command": ["sh", "-c", WATCHED, "sh", *command],
        "env": [{"name": "SVA_DISTRIBUTED", "value": "1" if hosts > 1 else "0"}],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        **({"envFrom": [{"secretRef": {"name": f"{arguments.name}-env"}}]} if arguments.env else {}),
        "resources": {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}},
    }
    pod = {
        "restartPolicy": "Never",
        "nodeSelector": selector | ({"cloud.google.com/gke-spot": "true"} if arguments.spot else {}),
        "terminationGracePeriodSeconds": 60,  # SIGTERM saves the state
        "containers": [container],
    }
    rules = [
        {"action": "FailJob", "onExitCodes": {"containerName": "sva", "operator": "In", "values": [2]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
    ]
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": pod},
    }
    mistake = {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": arguments.name,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": arguments.restarts, "rules": [mistake]},
            "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": job}}],
        },
    }


def slurm(arguments, command):
    """Submits a batch job: one process a node; a preempted or timed-out one is put back into the queue."""
    if arguments.nodes < 1 or arguments.gpus < 0:
        return fail(f"--nodes {arguments.nodes} --gpus {arguments.gpus}: at least 1 node and 0 GPUs")
    devices = ",".join(str(number) for number in range(arguments.gpus))
    settings = {
        "job-name": arguments.name,
        "nodes": arguments.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": arguments.gpus,
        "time": f"{arguments.hours}:00:00",
        "signal": "B:TERM@120",  # two minutes before the end, to the script
        "open-mode": "append",
        "output": f"{arguments.name}-%j.log",
    }
    if arguments.partition:
        settings["partition"] = arguments.partition
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH --{key}={value}" for key, value in settings.items())]
    lines += ["#SBATCH --requeue", "set -u"]
    for name in arguments.env:
        lines += [f': "${{{name}?launch: it was set where the job was submitted and is not here}}"']
    # JAX gives a SLURM task one GPU unless it is told otherwise; here one process has the node's.
    lines += [f"export JAX_LOCAL_DEVICE_IDS={devices}"] if arguments.gpus else []
    lines += [
        "again() {",
        f'    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {arguments.restarts} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        "}",
        # The step is told to save; then the job goes back into the queue.
        "trap 'kill -TERM $step; wait $step; again; exit 1' TERM",
        f"srun --kill-on-bad-exit=1 {shlex.join(command)} &",
        "step=$!",
        "wait $step",
        "code=$?",
        f'if [ "$code" -gt 128 ] && [ "$code" -le 192 ]; then echo {shlex.quote(f"launch: {LOST}")} >&2; fi',
        'if [ "$code" -ne 0 ] && [ "$code" -ne 2 ]; then again; fi',
        'exit "$code"',
    ]
    script = "\n".join(lines) + "\n"
    submit = ["sbatch", "--export=ALL"]  # the environment, whatever the site's default
    if arguments.dry_run:
        print(f"# {shlex.join(submit)}, with this on its standard input")
        print(script, end="")
        return 0
    return subprocess.run(submit, input=script, text=True).returncode


def show(what, command):
    """Prints one step of a dry run."""
    print(f"# {what}\n{shlex.join(command)}")


def fail(message):
    """Says what the user can mend; exit code 2."""
    print(f"launch: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
