import importlib.util
import json
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "launch.py"
RUN = ["--", "train", "a config.yaml", "run_dir=gs://bucket/run"]
PLACES = {
    "tpu-vm": ["--name", "pod", "--zone", "us-west4-a", "--type", "v5litepod-16", "--spot"],
    "gke": ["--name", "run", "--image", "image", "--type", "tpu-v5-lite-podslice", "--topology", "4x4"],
    "slurm": ["--name", "run", "--nodes", "4"],
}


@pytest.fixture
def launch(monkeypatch):
    """The launcher; a dry run that started a program would fail."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("launch", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def refuse(*arguments, **_):
        raise AssertionError(f"a dry run started {arguments}")

    monkeypatch.setattr(module.subprocess, "run", refuse)
    for name in module.USUAL:
        monkeypatch.delenv(name, raising=False)
    return module


def dry(launch, capsys, place, *changes):
    assert launch.main([place, *PLACES[place], *changes, "--dry-run", *RUN]) == 0
    return capsys.readouterr().out


def test_every_worker_of_a_tpu_vm_runs_the_command_and_knows_of_the_others(launch, capsys):
    lines = [shlex.split(x) for x in dry(launch, capsys, "tpu-vm").splitlines() if not x.startswith("#")]
    create, pack, copy, install, run, describe, delete = lines
    assert create[4:7] == ["create", "pod", "--zone=us-west4-a"]
    assert create[7:] == ["--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"]
    assert (pack[0], pack[-1]) == ("git", copy[5])
    for line in (copy, install, run):
        assert "--worker=all" in line
    assert "SVA_DISTRIBUTED=1 .venv/bin/sva train 'a config.yaml' run_dir=gs://bucket/run" in run[-1]
    assert describe[4:6] == ["describe", "pod"]
    assert delete[4:6] == ["delete", "pod"]


def test_a_jobset_has_one_pod_a_host_and_starts_all_again(launch, capsys):
    text = dry(launch, capsys, "gke", "--restarts", "7")
    manifest = json.loads(text.partition("(JSON is YAML)\n")[2])
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 7
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    container = job["template"]["spec"]["containers"][0]
    assert container["command"][4:] == ["sva", "train", "a config.yaml", "run_dir=gs://bucket/run"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["env"] == [{"name": "SVA_DISTRIBUTED", "value": "1"}]
    # A user's mistake fails the same way each time, a lost node does not.
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert job["podFailurePolicy"]["rules"][0]["action"] == "FailJob"
    assert manifest["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"


@pytest.mark.parametrize("code", [0, 2, 134])
def test_a_pod_says_that_its_command_was_ended_by_a_signal(launch, monkeypatch, code):
    monkeypatch.undo()  # from here on programs are run
    command = ["sh", "-c", launch.WATCHED, "sh", "sh", "-c", f"exit {code}"]
    found = subprocess.run(command, timeout=20, capture_output=True, text=True)
    assert found.returncode == code
    assert ("another one of the run was lost" in found.stderr) == (code > 128)


def test_a_pod_hands_sigterm_on_and_waits_for_its_command(launch, monkeypatch):
    monkeypatch.undo()
    program = "trap 'sleep 0.2; echo saved; exit 3' TERM; echo ready; while :; do sleep 0.05; done"
    command = ["sh", "-c", launch.WATCHED, "sh", "sh", "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as pod:
        assert pod.stdout.readline() == "ready\n"
        pod.terminate()
        assert pod.communicate(timeout=20) == ("saved\n", "")
    assert pod.returncode == 3


def test_a_batch_job_runs_one_process_a_node_and_is_put_back(launch, capsys):
    text = dry(launch, capsys, "slurm", "--partition", "gpus")
    script = text.partition("\n")[2]
    for line in ("--nodes=4", "--ntasks-per-node=1", "--requeue", "--signal=B:TERM@120", "--partition=gpus"):
        assert f"#SBATCH {line}\n" in script
    assert "srun --kill-on-bad-exit=1 sva train 'a config.yaml' run_dir=gs://bucket/run &" in script
    assert "JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7" in script


@pytest.mark.parametrize(("code", "restarts", "requeued"), [(0, 0, 0), (1, 0, 1), (1, 20, 0), (2, 0, 0), (134, 0, 1)])
def test_a_batch_job_goes_back_into_the_queue_only_where_that_can_help(
    launch, capsys, tmp_path, monkeypatch, code, restarts, requeued
):
    script = dry(launch, capsys, "slurm").partition("\n")[2]
    monkeypatch.undo()  # from here on programs are run: the script, with fake SLURM commands
    for name, body in {"srun": f"exit {code}", "scontrol": f'echo "$@" >> {tmp_path}/requeued'}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": str(restarts)}
    found = subprocess.run(["bash", "-c", script], env=environ, timeout=20, capture_output=True, text=True)
    assert found.returncode == code
    assert ("another one of the run was lost" in found.stderr) == (code > 128)
    log = tmp_path / "requeued"
    assert (log.read_text().splitlines() if log.exists() else []) == ["requeue 5"] * requeued


NONE = subprocess.CompletedProcess([], 1, "", "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource\n")
BROKEN = subprocess.CompletedProcess([], 1, "", "ERROR: (gcloud.compute.tpus.tpu-vm.describe) UNAVAILABLE\n")


@pytest.fixture
def on_a_pod(launch, monkeypatch):
    """Runs the launcher on a pod of these states, whose steps end with these codes and then with 0.

    Gives its exit code, the steps taken but for `describe`, in their order, and the pauses in seconds.
    """

    def start(states, **codes):
        steps, pauses = [], []

        def fake(command, **_):
            if command[0] == "git":
                return subprocess.CompletedProcess(command, 0, "", "")
            if command[4] == "describe":
                found = states.pop(0)
                return subprocess.CompletedProcess(command, 0, found, "") if isinstance(found, str) else found
            step = {"scp": "copy", "ssh": "run" if "SVA_DISTRIBUTED" in command[-1] else "install"}
            steps.append(step.get(command[4], command[4]))
            left = codes.get(steps[-1])
            return subprocess.CompletedProcess(command, left.pop(0) if left else 0)

        monkeypatch.setattr(launch.subprocess, "run", fake)
        monkeypatch.setattr(launch.time, "sleep", pauses.append)
        return launch.main(["tpu-vm", *PLACES["tpu-vm"], *RUN]), steps, pauses

    return start


MADE = ["create", "copy", "install"]


def test_a_preempted_pod_is_made_again_and_a_mistake_is_not_tried_twice(on_a_pod, capsys):
    code, steps, _ = on_a_pod([NONE, "PREEMPTED", "READY"], run=[255, 134, 2])
    assert (code, steps) == (2, [*MADE, "run", "delete", *MADE, "run", "run"])
    assert capsys.readouterr().err.count("another one of the run was lost") == 1


def test_a_pod_that_is_there_is_given_this_checkout_once(on_a_pod):
    assert on_a_pod(["READY", "READY"], run=[255])[:2] == (0, ["copy", "install", "run", "run"])


def test_an_install_that_failed_is_done_again(on_a_pod):
    assert on_a_pod([NONE, "READY"], install=[2])[:2] == (0, [*MADE, "copy", "install", "run"])


def test_a_pod_without_capacity_is_asked_for_again_after_ever_longer_pauses(on_a_pod):
    found = on_a_pod(["READY", "TERMINATED", NONE, NONE, NONE], run=[255], create=[1, 1, 1])
    again = ["delete", "create", "create", "create", *MADE]
    assert found == (0, ["copy", "install", "run", *again, "run"], [10, 20, 40, 80])


def test_a_pod_is_not_deleted_where_its_state_is_not_known_or_will_pass(on_a_pod, capsys):
    assert on_a_pod([BROKEN, "REPAIRING", "READY"])[1] == ["copy", "install", "run"]
    error = capsys.readouterr().err
    assert "UNAVAILABLE" in error
    assert "pod is REPAIRING, not READY" in error


def test_a_copy_of_the_checkout_is_what_git_knows_and_does_not_ignore(launch, monkeypatch, tmp_path):
    monkeypatch.undo()  # from here on programs are run: git, and a worker's shell with a Python that does nothing
    here, home = tmp_path / "here", tmp_path / "home"
    earlier = ("home/sva-run/sva/old.py", "home/sva-run/runs/2")
    for path in ("here/runs/1", "here/sva/new.py", "here/sva/gone.py", *earlier):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (here / ".gitignore").write_text("runs/\n")
    (here / ".venv").symlink_to(home)
    subprocess.run(["git", "init", "--quiet", str(here)], check=True)
    subprocess.run(["git", "-C", str(here), "add", "sva"], check=True)
    (here / "sva" / "gone.py").unlink()
    with (home / "sva-run.tar.gz").open("wb") as file:
        assert launch.pack(str(here), file) is None
    with tarfile.open(home / "sva-run.tar.gz") as archive:
        assert sorted(archive.getnames()) == [".gitignore", "sva/new.py"]
    (home / "python3").write_text('#!/bin/sh\necho "$3" "$4"\n')
    (home / "python3").chmod(0o755)
    pod = launch.Pod(launch.parser().parse_args(["tpu-vm", *PLACES["tpu-vm"]]), ["sva"])
    environ = {"PATH": f"{home}:/usr/bin:/bin"}
    for _ in range(2):
        run = subprocess.run(["bash", "-c", pod.install[-1]], cwd=home, env=environ, capture_output=True, text=True)
        assert (run.stdout, run.stderr) == ("install --quiet\nvenv --quiet\npip install\n", "")
    left = sorted(str(path.relative_to(home / "sva-run")) for path in (home / "sva-run").rglob("*") if path.is_file())
    assert left == [".gitignore", "runs/2", "sva/new.py"]


@pytest.mark.parametrize(("held", "code", "verbs"), [("", 0, []), ("run Failed", 0, ["delete"]), ("run ", 2, None)])
def test_a_job_set_that_has_ended_is_replaced_and_one_that_runs_is_let_be(
    launch, capsys, monkeypatch, held, code, verbs
):
    calls = []

    def fake(command, **_):
        calls.append(command[1:3])
        return subprocess.CompletedProcess(command, 0, stdout=held)

    monkeypatch.setattr(launch.subprocess, "run", fake)
    assert launch.main(["gke", *PLACES["gke"], *RUN]) == code
    assert calls == [["get", "jobset"]] + ([] if verbs is None else [*([x, "jobset"] for x in verbs), ["apply", "-f"]])
    assert ("the job set run has not ended" in capsys.readouterr().err) == (code == 2)


@pytest.mark.parametrize("place", PLACES)
def test_a_path_of_this_machine_is_handed_on_where_its_files_are_there_or_by_name(launch, capsys, monkeypatch, place):
    monkeypatch.setenv("SVA_DATA", "/home/me/data")
    monkeypatch.setenv("SVA_SPECTRA", "gs://bucket/spectra")
    for more, is_there in ((), place == "slurm"), (["--env", "SVA_DATA"], True):
        assert launch.main([place, *PLACES[place], *more, "--dry-run", *RUN]) == 0
        text, error = capsys.readouterr()
        assert "SVA_SPECTRA" in text
        assert ("SVA_DATA" in text) == is_there
        assert ("SVA_DATA is a path of this machine" in error) == (not is_there)


SECRET = "hf_0123456789 it's $HOME"


@pytest.mark.parametrize("place", PLACES)
def test_a_secret_is_in_nothing_that_is_printed(launch, capsys, monkeypatch, tmp_path, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", SECRET)  # handed on by itself
    monkeypatch.setenv("OWN", f"{SECRET} too")
    text = dry(launch, capsys, place, "--env", "OWN")
    assert SECRET not in text
    assert "0123456789" not in text
    assert "HF_TOKEN" in text
    assert "OWN" in text
    assert "SVA_DATA" not in text  # which is not set
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", PLACES)
def test_a_secret_reaches_the_run_in_no_argument(launch, capsys, monkeypatch, place):
    calls, files = [], {}

    def fake(command, **settings):
        calls.append((command, settings.get("input", "")))
        if "scp" in command and command[command.index("scp") + 2].endswith(".env"):
            path = Path(command[command.index("scp") + 1])
            files[path] = (path.read_text(), path.stat().st_mode & 0o777)
        return subprocess.CompletedProcess(command, 0, stdout="READY" if "describe" in command else "")

    monkeypatch.setattr(launch.subprocess, "run", fake)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert launch.main([place, *PLACES[place], *RUN]) == 0
    assert SECRET not in str([command for command, _ in calls])
    assert SECRET not in "".join(capsys.readouterr())
    given = {input_ for _, input_ in calls if SECRET in input_}
    if place == "gke":
        assert given == {f"HF_TOKEN={SECRET}\n"}
        assert "envFrom" in calls[-1][1]
    else:
        assert given == set()
    if place == "slurm":
        assert calls[0][0] == ["sbatch", "--export=ALL"]
    if place == "tpu-vm":
        ((path, (text, mode)),) = files.items()
        assert not path.exists()
        assert mode == 0o600
        monkeypatch.undo()  # from here on programs are run: the worker's shell reads the file
        show = f"set -a; {text}set +a; printenv HF_TOKEN"
        assert subprocess.run(["bash", "-c", show], capture_output=True, text=True).stdout == f"{SECRET}\n"


def test_a_worker_reads_the_variables_and_removes_their_file(launch, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    lines = [x for x in dry(launch, capsys, "tpu-vm").splitlines() if not x.startswith("#")]
    monkeypatch.undo()  # from here on programs are run, in a home with fake commands
    (tmp_path / "sva-run" / ".venv" / "bin").mkdir(parents=True)
    sva = tmp_path / "sva-run" / ".venv" / "bin" / "sva"
    sva.write_text('#!/bin/sh\necho "$HF_TOKEN"\n')
    (tmp_path / "pkill").write_text("#!/bin/sh\nexit 1\n")  # it found none
    for path in (tmp_path / "pkill", sva):
        path.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HF_TOKEN": SECRET}
    write = next(line for line in lines if "umask" in line)
    subprocess.run(["bash", "-c", write], cwd=tmp_path, env=environ, check=True)
    (file,) = tmp_path.glob("*.env")
    assert file.stat().st_mode & 0o777 == 0o600
    inside = next(shlex.split(line)[-1] for line in lines if "SVA_DISTRIBUTED" in line)
    environ = {"PATH": environ["PATH"]}
    found = subprocess.run(["bash", "-c", inside], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert (found.stdout, found.stderr) == (f"{SECRET}\n", "")
    assert not file.exists()


@pytest.mark.skipif(not shutil.which("pgrep"), reason="pgrep is not here")
def test_a_worker_ends_what_an_earlier_run_left_and_not_its_own_shell(launch, capsys, monkeypatch, tmp_path):
    inside = next(shlex.split(x)[-1] for x in dry(launch, capsys, "tpu-vm").splitlines() if "SVA_DISTRIBUTED" in x)
    monkeypatch.undo()  # from here on programs are run; what pkill would end is noted down
    pkill = f'pgrep --full "${{@: -1}}" >> {tmp_path}/ended'
    for name, body in {"pkill": pkill, "sleep": "", "sva-run/.venv/bin/sva": "echo ran"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    started = [f"{tmp_path}/sva-run/.venv/bin/python", "-c", "read line", ".venv/bin/sva"]  # as a script is started
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    pipe = subprocess.PIPE
    with subprocess.Popen(started, executable="/bin/sh", stdin=pipe) as left:
        with subprocess.Popen(["bash", "-c", inside], cwd=tmp_path, env=environ, stdout=pipe, text=True) as shell:
            assert shell.communicate(timeout=20)[0] == "ran\n"
        left.communicate(b"\n")
    ended = (tmp_path / "ended").read_text().split()
    assert ended.count(str(left.pid)) == 2
    assert str(shell.pid) not in ended


def test_a_batch_job_misses_a_variable_that_did_not_reach_it(launch, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    script = dry(launch, capsys, "slurm").partition("\n")[2]
    monkeypatch.undo()  # from here on programs are run
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$HF_TOKEN"\n')
    (tmp_path / "srun").chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    run = {"timeout": 20, "capture_output": True, "text": True}
    assert subprocess.run(["bash", "-c", script], env={**environ, "HF_TOKEN": SECRET}, **run).stdout == f"{SECRET}\n"
    without = subprocess.run(["bash", "-c", script], env=environ, **run)
    assert without.returncode != 0
    assert "HF_TOKEN: launch: it was set where the job was submitted and is not here" in without.stderr


@pytest.mark.parametrize(
    ("place", "program"), [("tpu-vm", "gcloud"), ("tpu-vm", "git"), ("gke", "kubectl"), ("slurm", "sbatch")]
)
def test_a_machine_without_the_program_is_one_line(launch, capsys, monkeypatch, place, program):
    def missing(words, **_):
        if words[0] != program:
            return subprocess.CompletedProcess(words, 0, stdout="")
        raise FileNotFoundError(2, "No such file or directory", words[0])

    monkeypatch.setattr(launch.subprocess, "run", missing)
    assert launch.main([place, *PLACES[place], *RUN]) == 2
    assert capsys.readouterr().err.startswith(f"launch: {program} is not on this machine; run this where it is")


def test_a_value_given_with_its_name_is_refused_and_not_repeated(launch, capsys):
    assert launch.main(["slurm", "--name", "x", "--env", f"HF_TOKEN={SECRET}", *RUN]) == 2
    error = capsys.readouterr().err
    assert "--env takes a name alone, not HF_TOKEN=..." in error
    assert "0123456789" not in error


@pytest.mark.parametrize("place", ["gke", "tpu-vm"])
def test_a_value_of_several_lines_is_refused_before_anything_is_started(launch, capsys, monkeypatch, place):
    monkeypatch.setenv("HF_TOKEN", "two\nlines")
    with pytest.raises(SystemExit) as ended:
        launch.main([place, *PLACES[place], *RUN])
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err == "launch: HF_TOKEN holds several lines, which cannot be handed on; put it into one\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["slurm", "--name", "x", "--env", "NOT_SET", *RUN], "--env NOT_SET is not set here; export it first"),
        (["slurm", "--name", "x", "--env", "A-B", *RUN], "'A-B' is not the name of an environment variable"),
        (["slurm", "--name", "x"], "write an sva command after --"),
        (["slurm", "--name", "x", "--nodes", "0", *RUN], "at least 1 node"),
        (["gke", *PLACES["gke"][:-1], "4by4", *RUN], "must be e.g. 4x4"),
        (["slurm", "--name", "x", "--restarts", "-1", *RUN], "must be at least 0"),
        (
            ["tpu-vm", "--name", "x", "--zone", "z", "--type", "v9-8", *RUN],
            "--type v9-8 has no known runtime",
        ),
    ],
)
def test_bad_input_is_one_line(launch, capsys, words, message):
    assert launch.main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
