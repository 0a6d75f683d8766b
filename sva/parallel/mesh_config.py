"""How many devices each mesh axis has: a setting, without JAX."""

import dataclasses

from sva.utils.errors import UserError
from sva.utils.trees import nearest


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis has; -1, for one of them, is what the others leave."""

    data: int = 1  # rows of a batch
    fsdp: int = 1  # rows of a batch, and the model's width of every matrix
    tensor: int = 1  # heads, mlp width and vocabulary
    moe: int = 1  # rows of a batch, and the modules of a mixture of experts

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if size < 1 and size != -1:
                raise UserError(f"mesh.{name}={size} must be at least 1, or -1 for what the other axes leave")
        if dataclasses.astuple(self).count(-1) > 1:
            raise UserError(f"{self} leaves more than one axis open; give -1 once")

    def __str__(self) -> str:
        return " x ".join(f"mesh.{name}={size}" for name, size in self.sizes.items())

    @property
    def sizes(self) -> dict[str, int]:
        """{axis: devices}; a mesh has the axis `moe` only where it divides something."""
        return {name: size for name, size in dataclasses.asdict(self).items() if name != "moe" or size != 1}


def parse(text: str) -> MeshConfig:
    """The mesh that `data=4,tensor=2` describes; an axis that is not named has one device.

    Raises:
      UserError: an axis that is not known or is named twice, a size that is not a whole number, or what `MeshConfig`
        refuses.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = (word.strip() for word in part.partition("="))
        known = [field.name for field in dataclasses.fields(MeshConfig)]
        if name not in known:
            raise UserError(f"mesh {text!r} has no axis {name!r}{nearest(name, known)}; write e.g. data=4,tensor=2")
        if name in sizes:
            raise UserError(f"mesh {text!r} names the axis {name} twice; name it once")
        if not (equals and size.removeprefix("-").isdecimal()):
            raise UserError(f"mesh {text!r}: {name}={size} is not a whole number of devices; write e.g. {name}=4")
        sizes[name] = int(size)
    return MeshConfig(**sizes)
