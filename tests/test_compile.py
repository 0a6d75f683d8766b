import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from sva.cli.aot import hlo
from sva.cli.aot import report as ahead
from sva.generation.testing import toy_config
from sva.models.config import to_hf
from sva.parallel.mesh_config import MeshConfig
from sva.training.config import Config
from sva.training.config.reinforce import ReinforceConfig
from sva.training.config.rollout import RolloutConfig
from sva.training.config.train import TrainConfig
from sva.utils.errors import UserError

# Wide enough that products outweigh the rest, and no width equals a number of tokens. Deep enough that one layer is
# little: unrolled, the compiler makes one of the last layer's forward pass and its recomputation right after it.
LAYERS = 6
WIDE = dataclasses.replace(
    toy_config(), hidden_size=80, intermediate_size=112, vocab_size=200, num_layers=LAYERS, windows=(0,) * LAYERS
)


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_the_bases_pass_for_the_kl_is_in_the_update_in_every_form(tmp_path, form):
    settings = config(tmp_path, reinforce=ReinforceConfig(kl_coef=0.1), form=form)
    program = report(settings)["programs"]["update"]
    assert program["flops_all"] == pytest.approx(program["flops_closed_form"], rel=0.05)


def config(tmp_path, **changes):
    (tmp_path / "config.json").write_text(json.dumps(to_hf(WIDE)))
    form = changes.pop("form", "factored")
    rollout = RolloutConfig(prompts=4, samples=2, max_new_tokens=64, form=form)
    return Config(model=str(tmp_path), rollout=rollout, train=TrainConfig(micro_batch=2), **changes)


def report(settings, **changes):
    arguments = {"hbm_gib": 1, "prompt_tokens": 31, "programs": ("update",)}
    return ahead.report(settings, jax.devices()[:1], **arguments | changes)


# Unrolled they take the compiler four times as long.
@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.long), True])
def test_operations_are_those_of_the_closed_form_scanned_and_unrolled(tmp_path, scan):
    settings = config(tmp_path, scan_layers=str(scan).lower())
    result = report(settings, programs=ahead.PROGRAMS)
    for name, program in result["programs"].items():
        assert program["flops_all"] == pytest.approx(program["flops_closed_form"], rel=0.05), name
    assert result["programs"]["update"]["weight_shaped_products"] == []
    assert result["run"]["fits"]
    assert result["advice"] == []


def test_the_dense_form_holds_the_weights_and_the_merged_ones_too(tmp_path):
    settings = config(tmp_path)
    factored = report(settings, programs=())["run"]["resident"]
    dense = dataclasses.replace(settings, rollout=dataclasses.replace(settings.rollout, form="dense"))
    result = report(dense, programs=("rollout",))
    held = result["run"]["resident"]
    assert result["programs"]["rollout"]["memory"]["merged weights"] == LAYERS * 3 * 80 * 112 * 4
    targets = LAYERS * 3 * 80 * 112 * 4
    assert held["weights"] == factored["weights"] + targets
    assert (held["spectra"], held["state"]) == (factored["spectra"], factored["state"])
    assert factored["spectra"] == LAYERS * 3 * 4 * (80 * (80 + 112) + 80)


@pytest.mark.parametrize("parametrisation", ["lora:r=4,alpha=8", "dora:r=4,alpha=8", "ia3"])
def test_an_expert_without_spectra_is_reported_without_them(tmp_path, parametrisation):
    settings = config(tmp_path, parametrisation=parametrisation, targets="mlp", form="dense")
    result = report(settings, programs=("update", "two_pass"))
    assert set(result["programs"]) == {"update"}
    resident = result["run"]["resident"]
    assert resident["spectra"] < resident["weights"] / 50
    assert resident["state"] > 3 * 4 * LAYERS * (2 * 112 + 80)
    program = result["programs"]["update"]
    assert program["flops_all"] == pytest.approx(program["flops_closed_form"], rel=0.15)


def test_what_does_not_fit_is_told_with_what_to_change(tmp_path):
    settings = config(tmp_path)
    dense = dataclasses.replace(settings, rollout=dataclasses.replace(settings.rollout, form="dense"))
    result = report(dense, hbm_gib=1e-4)
    assert not result["run"]["fits"]
    assert any("rollout.form=factored" in line for line in result["advice"])
    assert "does not fit" in ahead.summary(result)


def test_bad_input_is_one_line(tmp_path):
    settings = config(tmp_path)
    with pytest.raises(UserError, match="mesh.fsdp=3 x mesh.tensor=1 makes 3 devices, but there are 1"):
        report(dataclasses.replace(settings, mesh=MeshConfig(1, 3)))
    no_budget = dataclasses.replace(settings, rollout=RolloutConfig())
    with pytest.raises(UserError, match="rollout.max_new_tokens must be set"):
        report(no_budget)


def test_loops_are_multiplied_out():
    w = jnp.ones((5, 8, 8))

    def nested(x):
        def layer(x, w):
            return jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ w), x), None

        return jax.lax.scan(layer, x, w)[0]

    compiled = jax.jit(nested).lower(jnp.ones((4, 8))).compile()
    found = hlo.analyse(compiled.as_text())
    assert found.flops == 5 * 3 * 2 * 4 * 8 * 8
    assert sorted(found.loops.values()) == [5, 15]
    assert found.unknown == []


def test_a_loop_that_stops_on_a_condition_runs_as_often_as_is_said():
    def search(x):
        return jax.lax.while_loop(lambda y: y.sum() < 100, lambda y: y @ y, x)

    text = jax.jit(search).lower(jnp.ones((4, 4))).compile().as_text()
    assert hlo.analyse(text, open_turns=7).flops == 7 * 2 * 4**3
    assert len(hlo.analyse(text).unknown) == 1


def test_batched_products_written_as_convolutions_count_what_is_no_padding():
    # As TPUs write a batch of 8 products [16, 2] x [2, 4]: a window of 8 over dilated rows.
    text = """
ENTRY %main (a: f32[8,16,2], b: f32[8,2,4]) -> f32[8,16,4] {
  %a = f32[8,16,2]{2,1,0} parameter(0)
  %b = f32[8,2,4]{2,1,0} parameter(1)
  ROOT %c = f32[8,16,4]{2,1,0} convolution(%a, %b), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf
}
"""
    assert hlo.analyse(text).flops == 8 * 2 * 16 * 2 * 4


def test_a_ragged_kernel_counts_the_rows_that_have_a_matrix_here():
    text = """
ENTRY %main (n: s32[8], x: bf16[64,16], w: bf16[8,16,4]) -> bf16[64,4] {
  %n = s32[8]{0} parameter(0)
  %x = bf16[64,16]{1,0} parameter(1)
  %w = bf16[8,16,4]{2,1,0} parameter(2)
  ROOT %r = bf16[64,4]{1,0} custom-call(%n, /*index=1*/%x, %w), frontend_attributes={ragged_dot_tiling="8,16,4"}
}
"""
    assert hlo.analyse(text).flops == 2 * 64 * 16 * 4
    assert hlo.analyse(text, met=1 / 4).flops == 2 * 16 * 16 * 4


def test_a_ragged_product_of_the_modules_shape_is_found():
    def update(x, w, sizes):
        return jax.grad(lambda w: jax.lax.ragged_dot(x, w, sizes).sum())(w)

    shapes = (jnp.ones((64, 16)), jnp.ones((8, 16, 48)), jnp.ones(8, jnp.int32))
    text = jax.jit(update).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
    assert ahead.weight_shaped(text, {"w": (48, 16)}, leads={8}) == ["8x16x48"]
    assert ahead.weight_shaped(text, {"w": (48, 16)}, leads={3}) == []
    assert ahead.weight_shaped(text, {"w": (48, 64)}, leads={8}) == []  # the 64 rows' own


def test_a_product_of_a_weights_shape_is_found():
    def update(x, g):
        return jnp.einsum("td,tf->df", x, g)

    text = jax.jit(update).lower(jnp.ones((31, 64)), jnp.ones((31, 112))).as_text()
    assert ahead.weight_shaped(text, {"w": (112, 64)}, leads={3}) == ["64x112"]
    assert ahead.weight_shaped(text, {"w": (112, 65)}, leads={3}) == []


def test_what_the_compiler_refuses_is_read_from_its_message():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 19.50G of 15.75G hbm. Exceeded by 3.75G."
    assert ahead.refused_temporaries(message, given=2**30) == int(18.5 * 2**30)
    message = "Ran out of memory on HBM, the total memory required for HLO temporaries (31.50G) exceeds available HBM"
    assert ahead.refused_temporaries(message, given=2**30) == int(31.5 * 2**30)
    assert ahead.refused_temporaries("INVALID_ARGUMENT: something else", given=0) is None
