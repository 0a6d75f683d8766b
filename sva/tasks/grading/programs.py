"""The program in a completion: the module that defines a function, with what it needs and without examples of its use.

The field's rules differ here: evalplus' sanitizer keeps imports, definitions and assignments that the function reaches
(evalplus#188, evalplus#190), by which a table that a loop fills is lost; others run the first block, or the last, as it
stands. Here the last block that defines the function stays whole, with its loops, conditions, calls and `try`. Left out
is what only shows its use.
"""

import ast
import re
import sys
import textwrap
from collections.abc import Sequence

from sva.tasks.grading import python_text
from sva.tasks.grading.python_text import Piece
from sva.tasks.grading.statements import (
    BUILTINS,
    ENDS,
    INPUTS,
    Statement,
    is_main_guard,
    is_setting,
    is_showing_import,
    statements,
)
from sva.tasks.grading.wrappings import unwrapped

_ANSWERS = (ast.Return, ast.Yield, ast.YieldFrom, ast.Raise)
_LONGEST = 100_000  # characters of a completion that are looked at, the last ones


def extract(completion: str, name: str, prompt: str = "") -> str | None:
    """The program in a completion that defines the function `name`; None where there is none.

    The last stretch of code that defines it, blocks before code among words; else, where `prompt` is the beginning of a
    program, its continuation. What `prompt` imports and defines before `name` comes first, then what other stretches
    define that the program uses.

    Left out: prints, assertions, the main guard, runs of tests and calls of exit; what reads input or depends on it;
    examples, which use the function and change nothing that it reads; unused imports from outside the standard library.
    """
    text = unwrapped(completion).rstrip()[-_LONGEST:].replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
    found = python_text.pieces(text)
    begins = re.search(rf"^(?:async )?def {re.escape(name)}\b", prompt, re.MULTILINE)
    before = python_text.code_at(prompt[: begins.start()]) if begins else None
    main = _main(found, name) if not _goes_on(text, name, prompt) else None
    if main is None and prompt and (continued := _continued(text, found, name, prompt)):
        main, before = continued, None
    main = main or _main(found, name)
    if main is None:
        return None
    module = statements(main.source, main.tree)
    start = statements(before.source, before.tree) if before else []
    module = [*start, *_support(found, main, [*start, *module], name), *module]
    kept = _without_use(module, name)
    first = [s for s in kept if isinstance(s.node, ast.ImportFrom) and s.node.module == "__future__"]
    return "\n".join(s.text for s in [*first, *(s for s in kept if s not in first)]) + "\n"


def _definition(tree: ast.Module, name: str) -> ast.stmt | None:
    """The last top-level statement that binds `name`, inside of conditions and the like too."""
    found = None
    for statement in tree.body:
        waiting: list[ast.AST] = [statement]
        while waiting:
            part = waiting.pop()
            if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                bound = part.name == name
            elif isinstance(part, (ast.Import, ast.ImportFrom)):
                bound = any((alias.asname or alias.name) == name for alias in part.names)
            else:
                bound = isinstance(part, ast.Name) and part.id == name and isinstance(part.ctx, ast.Store)
                inner = (ast.stmt, ast.ExceptHandler, ast.match_case, ast.Name, ast.Tuple)
                waiting += [child for child in ast.iter_child_nodes(part) if isinstance(child, inner)]
            found = statement if bound else found
    return found


def _is_no_function(node: ast.stmt) -> bool:
    """Whether a statement that binds a name imports it or binds plain data, as a line of output does."""
    value = node.value if isinstance(node, ast.Assign) else None
    data = (ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.UnaryOp)
    return isinstance(node, (ast.Import, ast.ImportFrom)) or isinstance(value, data)


def _is_stub(node: ast.stmt) -> bool:
    """Whether it is a function that does nothing: its text, `pass`, an ellipsis."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return False
    idle = [
        isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)) for s in node.body
    ]
    return all(idle)


def _main(found: Sequence[Piece], name: str) -> Piece | None:
    """The piece that defines `name` best: fully, in a block, last."""

    def rank(numbered: tuple[int, Piece]) -> tuple[bool, bool, bool, int]:
        number, piece = numbered
        node = _definition(piece.tree, name)
        assert node is not None
        return not _is_no_function(node), piece.is_complete and not _is_stub(node), piece.is_block, number

    defining = [(i, piece) for i, piece in enumerate(found) if _definition(piece.tree, name)]
    return max(defining, key=rank)[1] if defining else None


def _goes_on(text: str, name: str, prompt: str) -> bool:
    """Whether a text begins inside the function with which the prompt ends."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    again = re.search(rf"^[ \t]+(?:async )?def {re.escape(name)}\b", text, re.MULTILINE)
    return bool(prompt) and first.startswith((" ", "\t")) and "```" not in first and not again


def _continued(text: str, found: Sequence[Piece], name: str, prompt: str) -> Piece | None:
    """The program that the prompt becomes with the text, or with a block, behind it."""
    again = re.search(rf"^(?:async )?def {re.escape(name)}\b", text, re.MULTILINE)
    text = text[: again.start()] if again else text
    bare = python_text.code_at(prompt)
    begun = _definition(bare.tree, name) if bare else None
    blocks = [textwrap.indent(piece.source, "    ") for piece in reversed(found) if piece.is_block]
    for body in (text, *blocks, "    " + text.lstrip("\n")):
        piece = python_text.code_at(prompt.rstrip() + "\n" + body.lstrip("\n"))
        node = _definition(piece.tree, name) if piece else None
        answers = node is not None and any(isinstance(part, _ANSWERS) for part in ast.walk(node))
        if piece and node and answers and not (begun and ast.dump(node) == ast.dump(begun)):
            return piece
    return None


def _support(found: Sequence[Piece], main: Piece, module: Sequence[Statement], name: str) -> list[Statement]:
    """Definitions in other pieces that the module uses: from the nearest before it, else from the first behind it."""
    place = next((i for i, piece in enumerate(found) if piece is main), len(found))
    others = {i: statements(piece.source, piece.tree) for i, piece in enumerate(found) if i != place}
    order = [*reversed(range(place)), *range(place + 1, len(found))]
    taken: dict[tuple[int, int], Statement] = {}
    bound = BUILTINS.union({name}, *(s.names.binds for s in module))
    wanted = sorted(set().union(*(s.needs | s.names.later for s in module)) - bound)

    def take(number: int, of: str) -> bool:
        about = [(i, s) for i, s in enumerate(others[number]) if of in s.names.binds | s.names.changes]
        about = [(i, s) for i, s in about if name not in s.names.binds and not is_main_guard(s.node)]
        if not any(of in s.names.binds for _, s in about):
            return False
        for i, statement in about:
            if (number, i) not in taken:
                taken[number, i] = statement
                wanted.extend(sorted(statement.needs | statement.names.later))
        return True

    for number in range(place):
        for i, statement in enumerate(others[number]):
            if found[number].is_block and is_setting(statement):
                taken[number, i] = statement
                wanted.extend(sorted(statement.needs))
    while wanted:
        of = wanted.pop()
        if of not in bound:
            bound |= {of}
            any(take(number, of) for number in order)
    return [taken[key] for key in sorted(taken)]


def _needed(module: Sequence[Statement], name: str) -> set[str]:
    """The names on which the function may depend."""
    about: dict[str, list[Statement]] = {}
    for statement in module:
        for of in statement.names.binds | statement.names.changes:
            about.setdefault(of, []).append(statement)
    needed, waiting = {name}, [name]
    while waiting:
        for statement in about.pop(waiting.pop(), []):
            new = (statement.needs | statement.names.later) - needed
            needed |= new
            waiting += new
    return needed


def _is_missing(node: ast.stmt) -> bool:
    """Whether it imports what is not in the standard library, which is all that the sandbox has."""
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom):
        modules = [node.module or ""]
    return any(module.partition(".")[0] not in sys.stdlib_module_names for module in modules)


def _without_use(module: Sequence[Statement], name: str) -> list[Statement]:
    """The module without what shows its use."""
    needed, kept = _needed(module, name), []
    functions = {of: s for s in module if s.defines_function for of in s.names.binds if of != name}
    shown = {name}.union(needed & functions.keys())
    tools = ENDS.union(*(s.names.binds for s in module if is_showing_import(s.node)))
    gone: set[str] = set()  # names that a statement which is left out would have bound
    for statement in module:
        names, node = statement.names, statement.node
        reached, changed = _reached(names.reads, functions)
        is_needed = bool((names.binds | names.changes) & needed or (names.given | changed) & needed - {name})
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            stays = is_needed or not _is_missing(node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            stays = is_needed or not statement.needs & gone
        elif is_main_guard(node) or reached & INPUTS or statement.needs & gone:
            stays = False
        else:
            stays = is_needed or not (reached & shown or (reached & tools and isinstance(node, ast.Expr)))
        if stays:
            kept.append(statement)
            gone -= names.binds
        else:
            gone |= names.binds
    return kept


def _reached(reads: set[str], functions: dict[str, Statement]) -> tuple[set[str], set[str]]:
    """The names that are looked up, and those that may be changed, where a statement that reads `reads` runs."""
    reached, changed, waiting = set(reads), set(), list(reads)
    while waiting:
        if function := functions.get(waiting.pop()):
            changed |= function.names.later_changes
            new = function.names.later - reached
            reached |= new
            waiting += new
    return reached, changed
