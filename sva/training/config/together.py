"""Settings that are each sound and do not go together."""

from collections.abc import Sequence

from sva.adapters.spelling import DIAGONAL, LOW_RANK, UNDECOMPOSED, Spelling
from sva.training.config.evolution import EvolutionConfig
from sva.training.config.guards import BOUNDS, GuardConfig
from sva.training.config.reinforce import ReinforceConfig, check_samples
from sva.training.config.rollout import RolloutConfig
from sva.training.config.train import TrainConfig
from sva.utils.errors import UserError


def check(
    parametrisation: Spelling,
    rollouts: RolloutConfig,
    loss: ReinforceConfig,
    cfg: TrainConfig,
    search: EvolutionConfig,
    watch: GuardConfig,
) -> None:
    """Raises UserError for settings that are each sound and do not go together."""
    if rollouts.form == "factored" and parametrisation.name in UNDECOMPOSED:
        raise UserError(
            f"rollout.form=factored runs on spectra alone, and {parametrisation} has none; leave it out (dense)"
        )
    if cfg.bound is not None and parametrisation.name in LOW_RANK:
        raise UserError(
            f"train.bound={cfg.bound} is of raw values around a centre, {parametrisation} has none; leave it out"
        )
    if cfg.init_noise and parametrisation.name not in DIAGONAL:
        raise UserError(f"train.init_noise={cfg.init_noise} is of a z, and {parametrisation} is none; leave it out")
    if cfg.method == "evolution":
        if parametrisation.name not in DIAGONAL:
            raise UserError(
                f"train.method=evolution gives every row a z of its own, and {parametrisation} is no z; use "
                f"{', '.join(DIAGONAL[:-1])} or {DIAGONAL[-1]}"
            )
        if rollouts.is_tempered:
            raise UserError(f"rollout.temperature={rollouts.temperature}: evolution answers greedily; leave it out")
        if cfg.optimizer != "adam" or cfg.schedule != "constant":
            raise UserError("train.optimizer and train.schedule are for gradients, not for train.method=evolution")
        if cfg.param_dtype != "float32":
            raise UserError(f"train.param_dtype={cfg.param_dtype} is for gradients; evolution needs float32")
        if cfg.bound is not None and search.strategy == "es":
            raise UserError(f"train.bound={cfg.bound} is for gradients and for evolution.strategy=cem, not for es")
        if loss.has_kl:
            raise UserError(
                "reinforce.kl_coef and reinforce.measure_kl are for gradients, not for train.method=evolution"
            )
        _check_watched(watch, cfg.method, ("max_kl", "min_entropy"))
        return
    if rollouts.form == "factored" and parametrisation.name not in DIAGONAL:
        raise UserError(
            f"rollout.form=factored leaves the target weights out, and {parametrisation} adds to them; use "
            "rollout.form=dense"
        )
    if rollouts.prompts % cfg.micro_batch:
        raise UserError(
            f"rollout.prompts={rollouts.prompts} is no multiple of train.micro_batch={cfg.micro_batch}; change one"
        )
    if cfg.method == "policy_gradient":
        check_samples(rollouts.samples, loss)
    if cfg.method == "next_token":
        _check_watched(watch, cfg.method, ("min_reward",))
    if cfg.param_dtype != "float32" and parametrisation.name == "dora":
        raise UserError(
            f"train.param_dtype={cfg.param_dtype} would round the lengths that {parametrisation} starts from, and so "
            "the base; leave it out (float32)"
        )
    if watch.max_kl is not None and not loss.has_kl:
        raise UserError(f"guards.max_kl={watch.max_kl} needs a KL: set reinforce.kl_coef or reinforce.measure_kl=true")


def _check_watched(watch: GuardConfig, method: str, unmeasured: Sequence[str]) -> None:
    """Raises UserError for a bound of a metric that the method does not measure, which would never be crossed."""
    for setting in unmeasured:
        if (bound := getattr(watch, setting)) is not None:
            metric = next(metric for name, metric, _ in BOUNDS if name == setting)
            raise UserError(f"guards.{setting}={bound}: train.method={method} measures no {metric}; leave it out")
