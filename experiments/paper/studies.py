"""A measurement of experts that are trained already: its settings, the cells that it needs, and its key.

It is queued, claimed, filed and refused like a cell; `measure.py` has what each kind of it does.
"""

import functools
from dataclasses import dataclass
from typing import Any

from experiments.paper.cells import Cell, digest_of_flat
from experiments.paper.revisions import CURRENT
from experiments.paper.scales import Scale


@dataclass(frozen=True)
class Study:
    """One measurement; `method` is its kind, a name in `measure.MEASURES`."""

    scale: Scale
    method: str
    settings: tuple[tuple[str, Any], ...]
    needs: tuple[Cell, ...]  # whose experts it reads, or trains along
    stage: str = "studies"

    @property
    def name(self) -> str:
        """What it is called in lists."""
        return "/".join([self.stage, self.method, *(f"{name} {_short(value)}" for name, value in self.settings)])

    @property
    def seed(self) -> int:
        """The seed of the cells that it needs."""
        return self.needs[0].seed

    @property
    def flat(self) -> dict[str, Any]:
        """Its settings and the digests of the cells that it needs."""
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in self.settings}
        return {
            "study": self.method,
            "model": self.scale.model,
            **settings,
            "needs": [cell.digest for cell in self.needs],
        }

    @functools.cached_property
    def digest(self) -> str:
        """12 hex digits of `flat`."""
        return digest_of_flat(self.flat)

    @property
    def key(self) -> str:
        """The name of its record: `digest` and the two revisions."""
        return f"{self.digest}-{CURRENT.training}-{CURRENT.grading}"

    def __getitem__(self, name: str) -> Any:
        return dict(self.settings)[name]


def _short(value: Any) -> str:
    return "+".join(value) if isinstance(value, tuple) else str(value)
