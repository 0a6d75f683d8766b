"""Stacked layers seen one by one, by weight name, while they are held as stacks alone."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict


class ByName(Mapping[str, Any]):
    """The values of a linen tree by weight name; a layer is a slice of its stack, made whenever it is asked for.

    `tree` holds the stacks, nested as the model's parameters; whoever wants all layers at once takes it.
    """

    def __init__(self, tree: Mapping[str, Any], places: Mapping[str, tuple[tuple[str, ...], int]]) -> None:
        self.tree = tree
        self._of_path: dict[Any, Any] = flatten_dict(dict(tree))
        self._places = dict(places)  # {name: (path in the tree, layer)}

    def __getitem__(self, name: str) -> Any:
        path, layer = self._places[name]
        return jax.tree.map(lambda x: x[layer], self._of_path[path])

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def map(self, change: Callable[[Any], Any]) -> "ByName":
        """The view of `change` of every stack."""
        return ByName(unflatten_dict({path: change(x) for path, x in self._of_path.items()}), self._places)
