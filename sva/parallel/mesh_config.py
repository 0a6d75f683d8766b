"""How many devices each mesh axis has: a setting, without JAX."""

import dataclasses

from sva.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis has; -1, for one of them, is what the others leave."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if size < 1 and size != -1:
                raise UserError(f"mesh.{name}={size} must be at least 1, or -1 for what the other axes leave")
        if dataclasses.astuple(self).count(-1) > 1:
            raise UserError(f"{self} leaves more than one axis open; give -1 once")

    def __str__(self) -> str:
        return " x ".join(f"mesh.{name}={size}" for name, size in dataclasses.asdict(self).items())
