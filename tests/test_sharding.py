import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import sva
from sva.generation.testing import toy_lm
from sva.models import layout
from sva.models.checkpoint_formats import open_checkpoint
from sva.models.config import from_hf
from sva.models.load import load_params
from sva.models.transformer import Transformer
from sva.models.weights import expected
from sva.parallel import processes as distributed
from sva.parallel.mesh_config import MeshConfig
from sva.parallel.sharding import AXES, Leaf, check_rows, make_mesh, notes, partition
from sva.utils.errors import TransientError, UserError

ROOT = Path(__file__).parent.parent
WORKER = ROOT / "tests" / "mesh_worker.py"
TWO_PASS = ROOT / "tests" / "two_pass_worker.py"
HALF_WRITTEN = "Error reading persistent compilation cache entry"  # by another process, just now; see pyproject.toml
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
QUERY, KEY = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def mesh(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def run(script, *arguments, devices=8, **environ):
    """A process of its own with so many host devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    env = (
        os.environ
        | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": f"error,ignore:{HALF_WRITTEN}"}
        | environ
    )
    return subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_spectra_inherit_their_weights_axes():
    weights, on = expected(from_hf(SMOLLM2)), mesh(2, 2, 2)
    assert partition(weights[UP], on) == P("tensor", "fsdp")
    assert partition(weights[DOWN], on) == P("fsdp", "tensor")
    for name in (UP, DOWN):
        u, s, vt = layout.spectrum(weights[name], 576)
        (out_axis, in_axis) = partition(weights[name], on)
        assert partition(u, on)[0] == out_axis
        assert partition(vt, on)[1] == in_axis
        assert partition(s, on) == P(None)
        # Between them lies the axis of singular values, on what the other dimension leaves free.
        assert {partition(u, on)[1], out_axis} == {partition(vt, on)[0], in_axis} == {"fsdp", "tensor"}


def test_heads_that_do_not_divide_are_repeated_and_told_of_once_an_axis():
    model = Transformer(from_hf(SMOLLM2))
    weights, on = expected(model.cfg), mesh(2, 2, 2)
    assert partition(weights[QUERY], on) == P(None, "fsdp")  # 576 = 9 heads of 64 would divide by 2, the heads do not
    assert partition(weights[KEY], on) == P(None, "fsdp")
    told = notes(layout.params(model), on)
    assert told == [
        "heads (9) is repeated: tensor = 2 does not divide it; choose a divisor of 9",
        "kv_heads (3) is repeated: tensor = 2 does not divide it; choose a divisor of 3",
    ]
    assert notes(layout.params(model), mesh(2, 4, 1)) == []
    assert notes(layout.params(toy_lm().model), on) == []


def test_every_matrix_of_a_large_model_falls_into_as_many_parts_as_there_are_devices():
    cfg = from_hf(SMOLLM2 | {"num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192, "head_dim": 128})
    for sizes in ((1, 16, 1), (1, 4, 4), (1, 2, 8)):
        on = mesh(*sizes)
        spectra = [layout.spectrum(leaf, min(leaf.shape)) for name, leaf in expected(cfg).items() if "mlp" in name]
        for u, _, vt in spectra:
            for leaf in (u, vt):
                parts = [on.shape[axis] for axis in partition(leaf, on) if axis]
                assert int(np.prod(parts)) == 16


def test_the_layout_of_stacked_layers_is_that_of_the_arrays(toy):
    for scan in (False, True):
        lm = toy_lm(scan_layers=scan)
        shapes = jax.tree.map(lambda leaf: leaf.shape, layout.params(lm.model), is_leaf=lambda x: isinstance(x, Leaf))
        assert jax.tree.map(lambda x: x.shape, lm.params) == shapes


def test_a_mesh_that_does_not_make_the_devices_is_one_line():
    devices = jax.devices() * 8
    with pytest.raises(UserError, match=r"mesh.data=3 x mesh.fsdp=1 x mesh.tensor=1 makes 3 devices, but there are 8"):
        make_mesh(MeshConfig(3), devices)
    with pytest.raises(UserError, match=r"does not divide 8 devices: 3 is not a divisor"):
        make_mesh(MeshConfig(-1, 3), devices)
    with pytest.raises(UserError, match="mesh.fsdp=0 must be at least 1"):
        MeshConfig(1, 0)
    with pytest.raises(UserError, match="more than one axis open"):
        MeshConfig(-1, -1)
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


def test_a_batch_that_does_not_divide_the_mesh_is_one_line():
    check_rows("rollout.prompts", 8, mesh(2, 4, 1))
    with pytest.raises(UserError, match=r"rollout.prompts=6 does not divide over mesh.data x mesh.fsdp = 8"):
        check_rows("rollout.prompts", 6, mesh(2, 4, 1))


def check_equal(rows):
    for row in rows.values():
        for loss in row["kl_coefs"]:
            assert loss["loss_difference"] < 1e-5
            assert loss["gradient"] < 1e-5
            assert loss["gradient_worst_matrix"] < 1e-4
        assert row["first_pass_difference"] < 1e-5
        assert all(step["margin"] < 1e-3 for step in row["rollout_rows_differing"] + row["answers_differing"])


def test_meshes_equal_one_device(tmp_path):
    script = ROOT / "experiments/studies/sharding/equality.py"
    process = run(script, "--model", "toy", "--output", tmp_path / "result.json", "--meshes", "2x2x2", "--scan")
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-2000:]
    check_equal(json.loads((tmp_path / "result.json").read_text())["meshes"])


def read(path):
    """(losses of all steps, change of the raw values from the base)."""
    saved = dict(np.load(path))
    saved.pop("divided")
    return saved.pop("losses"), np.concatenate([saved[name] - 1 for name in sorted(saved)])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses and change of three steps on one device."""
    directory = tmp_path_factory.mktemp("alone")
    finish(run(WORKER, directory / "run", directory / "out.npz", "3:1x1x1", SVA_CACHE=str(directory / "cache")))
    return read(directory / "out.npz")


def finish(process):
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-3000:]
    return out


def check_same_run(found, alone):
    (losses, change), (wanted, wanted_change) = found, alone
    np.testing.assert_allclose(losses, wanted, rtol=1e-4, atol=1e-5)
    # Adam divides by the gradient's size: where a gradient is rounding, so is the sign of its step.
    assert np.linalg.norm(change - wanted_change) < 1e-2 * np.linalg.norm(wanted_change)


def test_a_run_holds_what_sva_compile_reports_scanned_and_unrolled(tmp_path):
    cases = ("dense:scan:2x2x2", "factored:scan:1x4x2", "dense:unrolled:1x1x1", "factored:unrolled:2x2x2")
    out = finish(run(ROOT / "tests" / "live_bytes_worker.py", tmp_path, *cases, SVA_CACHE=str(tmp_path / "cache")))
    for case, (held, reported) in json.loads(out.splitlines()[-1]).items():
        assert held == pytest.approx(reported, rel=0.02), case


@pytest.mark.long  # three meshes, each with programs of its own to compile
def test_a_checkpoint_written_on_one_mesh_resumes_on_another(tmp_path, alone):
    stages = ("1:2x2x2", "2:8x1x1", "3:1x4x2")
    finish(run(WORKER, tmp_path / "run", tmp_path / "out.npz", *stages, SVA_CACHE=str(tmp_path / "cache")))
    check_same_run(read(tmp_path / "out.npz"), alone)


def test_lora_trains_on_a_mesh_as_on_one_device_and_its_arrays_are_divided(tmp_path):
    found = {}
    for name, stage in (("one", "2:1x1x1"), ("mesh", "2:2x2x2")):
        environ = {"PARAMETRISATION": "lora:r=4,alpha=8,dropout=0.1", "SVA_CACHE": str(tmp_path / "cache")}
        finish(run(WORKER, tmp_path / name, tmp_path / f"{name}.npz", stage, **environ))
        found[name] = dict(np.load(tmp_path / f"{name}.npz"))
    assert found["mesh"].pop("divided").all()
    assert not found["one"].pop("divided").any()
    losses = found["mesh"].pop("losses"), found["one"].pop("losses")
    values = [
        np.concatenate([found[name][key].ravel() for key in sorted(found[name]) if key.endswith("/b")])
        for name in ("mesh", "one")
    ]
    check_same_run((losses[0], values[0]), (losses[1], values[1]))


def free_address():
    """An address of this machine where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def pair(tmp_path, *arguments, worker=WORKER, **environ):
    """Two processes of four devices each, which know of each other."""
    environ |= {"SVA_COORDINATOR": free_address(), "SVA_PROCESSES": "2", "SVA_CACHE": str(tmp_path / "cache")}
    return [run(worker, *arguments, devices=4, SVA_PROCESS=str(i), **environ) for i in range(2)]


def test_two_processes_train_as_one_device_and_process_0_writes(tmp_path, alone):
    for process in pair(tmp_path, tmp_path / "run", tmp_path / "out.npz", "3:4x2x1"):
        finish(process)
    check_same_run(read(tmp_path / "out.npz"), alone)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_arrays_divided_over_two_processes_are_saved_and_a_resumed_run_ends_bit_for_bit_as_one_never_stopped(tmp_path):
    stages = ("2:1x8x1:resumed", "3:1x8x1:resumed", "3:1x8x1:whole")
    for process in pair(tmp_path, tmp_path, tmp_path / "out.npz", *stages, PARAMETRISATION="lora:r=4,alpha=8"):
        finish(process)
    assert np.load(tmp_path / "out.npz")["divided"].any()
    resumed, whole = (
        ocp.StandardCheckpointer().restore(tmp_path / name / "state" / "3" / "default") for name in ("resumed", "whole")
    )
    assert jax.tree.leaves(whole)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


@pytest.mark.long  # the comparison of meshes above answers in two passes as well, and two processes train above
@pytest.mark.parametrize("processes", [1, 2])
def test_two_passes_on_a_mesh_and_on_two_processes_are_those_of_one_device(processes, tmp_path):
    cache = {"SVA_CACHE": str(tmp_path / "cache")}
    finish(run(TWO_PASS, tmp_path / "one.npz", "1x1x1", **cache))
    one = np.load(tmp_path / "one.npz")
    np.testing.assert_array_equal(one["alphas"][5:, 1:3], [[1, 0], [0, 1], [0, 0]])
    path = tmp_path / "more.npz"
    alone = processes == 1
    for process in [run(TWO_PASS, path, "2x2x2", **cache)] if alone else pair(tmp_path, path, "4x2x1", worker=TWO_PASS):
        finish(process)
    found = np.load(path)
    np.testing.assert_allclose(found["probs"], one["probs"], atol=1e-5)
    np.testing.assert_array_equal(found["alphas"], one["alphas"])
    np.testing.assert_array_equal(found["tokens"], one["tokens"])
    np.testing.assert_allclose(found["logprobs"], one["logprobs"], atol=1e-4)


@pytest.mark.long
def test_a_lost_process_ends_the_other_and_the_run_goes_on_on_a_smaller_mesh(tmp_path, alone):
    first, second = pair(tmp_path, tmp_path / "run", tmp_path / "out.npz", "200:4x2x1")
    assert first.stdout is not None
    while first.stdout.readline().split() != ["step", "1"]:
        assert first.poll() is None
    second.kill()
    first.communicate(timeout=300)
    second.communicate()
    assert first.returncode not in (0, 2)  # 1 with our line, or -6: JAX's runtime may abort before Python hears of it
    done = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    stage = f"{max(3, done)}:2x1x1"
    finish(run(WORKER, tmp_path / "run", tmp_path / "again.npz", stage, devices=2, SVA_CACHE=str(tmp_path / "cache")))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == max(3, done)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"SVA_COORDINATOR": "a:1"}, "SVA_COORDINATOR set, but not SVA_PROCESSES, SVA_PROCESS"),
        ({"SVA_COORDINATOR": "a:1", "SVA_PROCESSES": "2", "SVA_PROCESS": "2"}, "SVA_PROCESS=2 does not exist"),
        ({"SVA_COORDINATOR": "a:1", "SVA_PROCESSES": "two", "SVA_PROCESS": "0"}, "must be whole numbers"),
    ],
)
def test_a_run_of_several_processes_that_is_told_nonsense_is_one_line(environ, message):
    with pytest.raises(UserError, match=message):
        distributed.start(environ)


def test_others_that_come_too_late_are_no_mistake_of_the_users(monkeypatch):
    def initialize(**_):
        raise RuntimeError("DEADLINE_EXCEEDED: 1 of 2 tasks\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(
        TransientError, match=r"^the other processes of this run were not found: DEADLINE_EXCEEDED: 1 of"
    ):
        distributed.start({"SVA_COORDINATOR": "a:1", "SVA_PROCESSES": "2", "SVA_PROCESS": "0"})


def test_a_process_of_several_ends_when_it_is_told_to():
    program = "import os, signal, time; from sva.parallel import processes as p; p.start(); os.kill(os.getpid(), 15)"
    environ = {"SVA_COORDINATOR": free_address(), "SVA_PROCESSES": "1", "SVA_PROCESS": "0"}
    process = run("-c", f"{program}; time.sleep(5); print('still here')", devices=1, **environ)
    assert process.communicate(timeout=100)[0] == ""
    assert process.returncode == -signal.SIGTERM


def test_only_what_is_one_of_several_processes_looks_for_the_others():
    step = {"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1"}
    assert not distributed.is_cluster({})
    assert not distributed.is_cluster(step | {"SLURM_NTASKS": "1"})
    assert not distributed.is_cluster({"SLURM_NTASKS": "4"})  # in the batch script, outside any step
    assert distributed.is_cluster(step | {"SLURM_NTASKS": "4"})
    assert distributed.is_cluster({"TPU_WORKER_HOSTNAMES": "a,b"})
    assert not distributed.is_cluster({"TPU_WORKER_HOSTNAMES": "localhost"})
    assert distributed.is_cluster({"SVA_DISTRIBUTED": "1"})


@pytest.mark.parametrize("scan", [False, True])
def test_loading_onto_a_mesh_gives_the_same_weights_and_reads_only_the_rows_asked_for(tmp_path, toy, scan):
    toy.save(tmp_path / "toy")
    checkpoint = open_checkpoint(tmp_path / "toy")
    on = jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])
    params, known = load_params(checkpoint, Transformer(toy.model.cfg, scan_layers=scan), mesh=on, progress=False)
    assert known == toy.fingerprint
    jax.tree.map(np.testing.assert_array_equal, params, toy_lm(scan_layers=scan).params)
    part = checkpoint.part(UP, (slice(3, 7), slice(1, 30)))
    np.testing.assert_array_equal(part, checkpoint.read(UP)[3:7, 1:30])
    assert part.base is None or part.base.nbytes == 4 * 32 * 4


@pytest.mark.parametrize("scan", [False, True])
def test_spectra_stand_in_for_weights_that_were_left_out(tmp_path, toy, scan):
    toy.save(tmp_path / "toy")
    lm = sva.load(str(tmp_path / "toy"), scan_layers=scan, without="mlp", progress=False)
    assert UP not in lm.named_params()
    assert lm.fingerprint == toy.fingerprint
    ids = np.arange(12).reshape(2, 6)
    np.testing.assert_allclose(lm.logits(ids, np.ones_like(ids)), toy.logits(ids, np.ones_like(ids)), atol=1e-4)
    spectra = sva.decompose(toy, "mlp", progress=False)
    z = {name: np.linspace(0.5, 1.5, len(x.s), dtype=np.float32) for name, x in spectra.items()}
    want = sva.merge(toy, spectra, z).generate(ids, np.ones_like(ids), 5)
    got = sva.merge(lm, sva.decompose(lm, "mlp", progress=False), z).generate(ids, np.ones_like(ids), 5)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
