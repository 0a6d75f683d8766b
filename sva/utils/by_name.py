"""Stacked layers and modules seen one by one, by weight name, while they are held as stacks alone."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict


@jax.tree_util.register_pytree_node_class
class ByName(Mapping[str, Any]):
    """The values of a linen tree by weight name; one is a slice of its stack, made whenever it is asked for.

    `tree` holds the stacks, nested as the model's parameters; whoever wants all layers at once takes it.
    """

    def __init__(self, tree: Mapping[str, Any], places: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]) -> None:
        self.tree = tree
        self._places = dict(places)  # {name: (path in the tree, index in the stack there)}

    def __getitem__(self, name: str) -> Any:
        path, at = self._places[name]
        stack = self.tree
        for key in path:
            stack = stack[key]
        return jax.tree.map(lambda x: x[at], stack) if at else stack

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def map(self, change: Callable[[Any], Any]) -> "ByName":
        """The view of `change` of every stack."""
        stacks = flatten_dict(dict(self.tree))
        return ByName(unflatten_dict({path: change(x) for path, x in stacks.items()}), self._places)

    def tree_flatten(self) -> tuple[tuple[Any], Any]:
        """For jit and `jax.tree.map`: the stacks are the leaves."""
        return (self.tree,), tuple(self._places.items())

    @classmethod
    def tree_unflatten(cls, places: Any, children: tuple[Any]) -> "ByName":
        """`tree_flatten` undone."""
        return cls(children[0], dict(places))
