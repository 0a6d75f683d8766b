"""A checkpoint of whichever format lies at a path."""

from pathlib import Path

from sva.models.checkpoint import Checkpoint
from sva.models.gguf import open_gguf
from sva.models.hf_directory import open_hf_directory
from sva.utils.errors import UserError
from sva.utils.remote import to_path


def open_checkpoint(path: Path | str) -> Checkpoint:
    """The checkpoint at `path`: a directory with config.json and safetensors, or a GGUF file.

    Raises:
      UserError: nothing readable there, a damaged file, a tensor set twice, an unsupported model or dtype.
    """
    path = to_path(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path} is neither a GGUF file nor a directory; give the directory that holds config.json")
        return open_gguf(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or directory; give a model directory, a .gguf file or a model name")
    return open_hf_directory(path)
