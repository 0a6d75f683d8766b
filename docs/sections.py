"""A griffe extension: `Returns:` and `Raises:` are sections of a docstring without a blank line before them, too."""

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    """Puts the blank line in that griffe's Google parser wants; only what is rendered changes."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute that was read."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)(?<!\n)\n(?=(Returns|Raises):$)", r"\n\n", obj.docstring.value)
