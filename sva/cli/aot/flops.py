"""Floating-point operations of a run's programs in closed form, which the compiled programs' own are held against."""

from sva.cli.aot.shapes import Shapes
from sva.models.cache import blocks_of
from sva.models.flops import head_flops, linear_flops, met, pair_flops
from sva.models.weights import expected


def last_flops(shapes: Shapes) -> int:
    """Of one token through the last product of every layer: U of down_proj, or the whole of it."""
    cfg, targets = shapes.model.cfg, shapes.decomposed
    total = 0.0
    for name, leaf in expected(cfg).items():
        if ".mlp." in name and name.endswith(".down_proj.weight"):
            inner = min(leaf.shape) if name in targets else leaf.shape[1]
            total += 2 * inner * cfg.hidden_size * met(cfg, name)
    return round(total)


def first_flops(shapes: Shapes) -> int:
    """Of one token back to the first layer's input, which nothing that is trained lies before; scanned, it is made."""
    total, targets = 0.0, shapes.decomposed
    for name, leaf in expected(shapes.model.cfg).items():
        if name.startswith("model.layers.0.") and len(leaf.shape) == 2:
            out, into = leaf.shape
            if name not in targets and "self_attn" in name:
                total += 2 * out * into
            elif name in targets and "down_proj" not in name:
                total += 2 * min(out, into) * into * met(shapes.model.cfg, name)
    return round(total)


def read_flops(shapes: Shapes, prompts: int, width: int, *, factored: bool) -> int:
    """Of reading so many prompts of that width."""
    cfg, tokens = shapes.model.cfg, prompts * width
    flops = tokens * linear_flops(cfg, shapes.decomposed if factored else ()) + tokens * width * pair_flops(cfg)
    unread = prompts * (width - 1)
    return (
        flops
        - unread * (unread_flops(shapes, factored=factored) + width * unread_pair_flops(shapes))
        + (prompts * head_flops(cfg))
    )


def round_flops(shapes: Shapes, rows: int, slots: int, steps: int, *, factored: bool) -> int:
    """Of one round of the engine: so many tokens a row, each of which looks at all slots, masked."""
    cfg, tokens = shapes.model.cfg, rows * steps
    flops = linear_flops(cfg, shapes.decomposed if factored else ()) + (slots + steps) * pair_flops(cfg)
    return tokens * (flops + head_flops(cfg))


def generation_flops(shapes: Shapes, prompts: int, rows: int, *, factored: bool) -> int:
    """Of reading the prompts and drawing every row's tokens."""
    cfg = shapes.model.cfg
    blocks, size = blocks_of(shapes.prompt + shapes.new, scan=shapes.model.scan_layers)
    slots = blocks * size
    tokens = prompts * shapes.prompt + rows * (shapes.new - 1)
    pairs = (prompts * shapes.prompt + rows * (shapes.new - 1)) * slots  # a row reads the whole cache, masked
    flops = tokens * linear_flops(cfg, shapes.decomposed if factored else ()) + pairs * pair_flops(cfg)
    unread = prompts * (shapes.prompt - 1)
    flops -= unread * (unread_flops(shapes, factored=factored) + slots * unread_pair_flops(shapes))
    return flops + rows * shapes.new * head_flops(cfg)


def unread_flops(shapes: Shapes, *, factored: bool = True) -> int:
    """Of one token through the last layer's weights beyond keys and values: what is left out where none asks for it."""
    if shapes.model.scan_layers:
        return 0
    last, targets = f"model.layers.{shapes.model.cfg.num_layers - 1}.", shapes.decomposed if factored else ()
    total = 0.0
    for name, leaf in expected(shapes.model.cfg).items():
        if name.startswith(last) and len(leaf.shape) == 2 and ".k_proj" not in name and ".v_proj" not in name:
            out, into = leaf.shape
            flops = 2 * min(out, into) * (out + into) if name in targets else 2 * out * into
            total += flops * met(shapes.model.cfg, name)
    return round(total)


def unread_pair_flops(shapes: Shapes) -> int:
    """Of one such token beside one key in the last layer."""
    cfg = shapes.model.cfg
    return 0 if shapes.model.scan_layers else pair_flops(cfg) // cfg.num_layers


def update_flops(shapes: Shapes) -> int:
    """Of one training step."""
    config, cfg = shapes.config, shapes.model.cfg
    prompts, rows = config.rollout.prompts, config.rollout.prompts * config.rollout.samples
    tokens = prompts * shapes.prompt + rows * shapes.new
    pairs = prompts * shapes.prompt**2 + rows * shapes.new * (shapes.prompt + shapes.new)
    # Forwards, and back to the activations alone: weights are frozen. Backwards, each product of a pair gives two.
    flops = 2 * tokens * linear_flops(cfg, shapes.decomposed) + 3 * pairs * pair_flops(cfg)
    flops -= (
        0 if shapes.model.scan_layers else tokens * first_flops(shapes) + 2 * pairs * pair_flops(cfg) // cfg.num_layers
    )
    unread = prompts * (shapes.prompt - 1)  # tokens whose last states nothing asks for
    flops -= 2 * unread * unread_flops(shapes) + 3 * unread * shapes.prompt * unread_pair_flops(shapes)
    if config.train.remat:  # all but each layer's last product, whose result is the next one's kept input
        flops += tokens * (linear_flops(cfg, shapes.decomposed) - last_flops(shapes)) + pairs * pair_flops(cfg)
        flops -= unread * (unread_flops(shapes) + shapes.prompt * unread_pair_flops(shapes))
    flops += 3 * rows * shapes.new * head_flops(cfg)  # recomputed always: see `sva.generation.logprobs.score`
    if config.reinforce.has_kl:  # the base model scores as well, forwards
        is_factored = config.rollout.form == "factored"
        flops += tokens * linear_flops(cfg, shapes.decomposed if is_factored else ()) + pairs * pair_flops(cfg)
        flops -= unread * (unread_flops(shapes, factored=is_factored) + shapes.prompt * unread_pair_flops(shapes))
        flops += 2 * rows * shapes.new * head_flops(cfg)
    return flops


def two_pass_flops(shapes: Shapes, states: int, prefix: int) -> int:
    """Of dispatch, whose label tree has `states` tokens after a prefix of `prefix` tokens, and of the answers."""
    cfg, rows = shapes.model.cfg, shapes.config.rollout.prompts * shapes.config.rollout.samples
    tokens = shapes.prompt + states
    flops = rows * tokens * linear_flops(cfg, shapes.decomposed)
    flops += rows * tokens * (prefix + tokens) * pair_flops(cfg) + rows * (states + 1) * head_flops(cfg)
    unread = rows * (shapes.prompt - 1)
    flops -= unread * (unread_flops(shapes) + (prefix + tokens) * unread_pair_flops(shapes))
    flops += generation_flops(shapes, rows, rows, factored=True)
    return flops
