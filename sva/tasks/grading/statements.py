"""Names in a program's top-level statements, and which statements only show how it is used. Nothing is run."""

import ast
import builtins
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

INPUTS = frozenset(["input", "raw_input", "stdin", "argv", "parse_args", "fileinput", "open"])
ENDS = frozenset(["exit", "quit", "_exit"])
"""Names, or attributes, by which a program reads what nobody gives it here, and by which it ends."""
BUILTINS = frozenset(dir(builtins)) | {"__name__", "__file__", "__doc__"}
_SHOWS = frozenset(["print", "pprint", "display", "testmod", "breakpoint"]) | ENDS
_SHOWING_MODULES = frozenset(["unittest", "doctest", "pytest", "timeit", "cProfile"])
_OUTPUTS = frozenset(["stdout", "stderr"])
_Function = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_Import = (ast.Import, ast.ImportFrom)


@dataclass
class Names:
    """Names of the module that a statement uses.

    Attributes:
      binds: it gives them a value.
      changes: it may change their value in place.
      given: a function that it calls may change their value.
      updates: it reads them before it binds them.
      inner: variables of a comprehension.
      reads: it looks them up when it runs.
      later: functions in it look them up when they are called.
      later_changes: functions in it may change their value.
    """

    binds: set[str] = field(default_factory=set)
    changes: set[str] = field(default_factory=set)
    given: set[str] = field(default_factory=set)
    updates: set[str] = field(default_factory=set)
    inner: set[str] = field(default_factory=set)
    reads: set[str] = field(default_factory=set)
    later: set[str] = field(default_factory=set)
    later_changes: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Statement:
    """A top-level statement; in `text` what only shows something is already "pass"."""

    node: ast.stmt
    text: str
    names: Names

    @property
    def defines_function(self) -> bool:
        """Whether calling what it binds runs code of its own."""
        is_lambda = isinstance(getattr(self.node, "value", None), ast.Lambda)
        return is_lambda or isinstance(self.node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))

    @property
    def needs(self) -> set[str]:
        """Names that must have a value before it runs."""
        is_compound = hasattr(self.node, "body") or isinstance(self.node, ast.Match)
        own = self.names.binds - self.names.updates if is_compound else set()
        return self.names.reads - own - self.names.inner


def statements(source: str, tree: ast.Module) -> list[Statement]:
    """The top-level statements of a program that do more than to show something."""
    data = source.encode()
    starts = [0, *itertools.accumulate(len(line) + 1 for line in data.split(b"\n"))]

    def span(node: ast.stmt) -> tuple[int, int]:
        first = min((node, *getattr(node, "decorator_list", ())), key=lambda part: part.lineno)
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        at = 0 if first is not node else node.col_offset
        return starts[first.lineno - 1] + at, starts[node.end_lineno - 1] + node.end_col_offset

    made = []
    for node in tree.body:
        if is_for_show(node):
            continue
        start, end = span(node)
        text, place = b"", start
        for inner_start, inner_end in sorted(map(span, _inner_shows(node))):
            text += data[place:inner_start] + b"pass"
            place = inner_end
        made.append(Statement(node, (text + data[place:end]).decode(), names_of(node)))
    return made


def is_for_show(node: ast.stmt) -> bool:
    """Whether a statement prints, asserts, ends the program or runs its tests, or has no effect."""
    if isinstance(node, ast.Assert) or (isinstance(node, ast.AnnAssign) and node.value is None):
        return True
    if isinstance(node, ast.Raise):
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return isinstance(raised, ast.Name) and raised.id in ("SystemExit", "KeyboardInterrupt")
    if not isinstance(node, ast.Expr):
        return False
    if not isinstance(node.value, ast.Call):
        doing = (ast.Call, ast.Await, ast.NamedExpr)
        return not any(isinstance(part, doing) for part in ast.walk(node.value))
    function, parts = node.value.func, []
    while isinstance(function, (ast.Attribute, ast.Call, ast.Subscript)):
        if isinstance(function, ast.Attribute):
            parts.append(function.attr)
        function = function.func if isinstance(function, ast.Call) else function.value
    if isinstance(function, ast.Name):
        parts.append(function.id)
    if not parts:
        return False
    return (
        (parts[0] in _SHOWS and len(parts) < 3)
        or parts[-1] in _SHOWING_MODULES
        or (len(parts) > 1 and (parts[1] in _OUTPUTS or parts[0] == "main"))
    )


def is_showing_import(node: ast.stmt) -> bool:
    """Whether it takes names out of a module that runs tests."""
    return isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in _SHOWING_MODULES


def is_main_guard(node: ast.stmt) -> bool:
    """Whether it is an `if` that asks for the module to be the one that is run."""
    if not isinstance(node, ast.If):
        return False
    for part in ast.walk(node.test):
        if isinstance(part, ast.Compare) and len(part.ops) == 1 and isinstance(part.ops[0], (ast.Eq, ast.Is, ast.In)):
            sides = [part.left, part.comparators[0]]
            names = {side.id for side in sides if isinstance(side, ast.Name)}
            texts = {p.value for side in sides for p in ast.walk(side) if isinstance(p, ast.Constant)}
            if names & {"__name__", "name", "_name_"} and texts & {"__main__", "main", "_main_"}:
                return True
    return False


def is_setting(statement: Statement) -> bool:
    """Whether it sets something for the whole process, such as the limit of recursion or a seed."""
    node = statement.node
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    function = node.value.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name.startswith(("setrecursionlimit", "set_int_max", "seed"))


def _inner_shows(node: ast.stmt) -> Iterator[ast.stmt]:
    """Statements for show within a compound one, outside functions and classes."""
    waiting: list[ast.AST] = [] if isinstance(node, (*_Function, ast.ClassDef)) else [node]
    while waiting:
        for child in ast.iter_child_nodes(waiting.pop()):
            if isinstance(child, ast.stmt) and is_for_show(child):
                yield child
            elif not isinstance(child, (*_Function, ast.ClassDef, ast.expr)):
                waiting.append(child)


def _root(node: ast.AST) -> str | None:
    """The name that a chain of attributes and items begins with."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _note(node: ast.AST, names: Names) -> None:
    """Adds what one node alone says."""
    if isinstance(node, ast.Name):
        (names.reads if isinstance(node.ctx, ast.Load) else names.binds).add(node.id)
    elif isinstance(node, (ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Attribute) and node.attr in INPUTS | ENDS:
            names.reads.add(node.attr)
        if not isinstance(node.ctx, ast.Load) and (root := _root(node)):
            names.changes.add(root)
    elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        names.reads.add(node.target.id)
        names.updates.add(node.target.id)
    elif isinstance(node, ast.comprehension):
        names.inner |= {part.id for part in ast.walk(node.target) if isinstance(part, ast.Name)}
    elif isinstance(node, _Import):
        names.binds |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
        names.binds.add(node.name)
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and (root := _root(node.func)):
            names.changes.add(root)
        elif isinstance(node.func, ast.Name) and (node.func.id not in BUILTINS or node.func.id == "setattr"):
            given = {arg.id for arg in node.args if isinstance(arg, ast.Name)}
            (names.changes if node.func.id == "setattr" else names.given).update(given)


def _signature(node: ast.AST) -> list[ast.AST]:
    """The parts of a function that run when it is defined."""
    assert isinstance(node, _Function)
    args = node.args
    parts: list[ast.AST | None] = [*args.defaults, *args.kw_defaults]
    if not isinstance(node, ast.Lambda):
        every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
        parts += [*node.decorator_list, node.returns, *(arg.annotation for arg in every if arg)]
    return [part for part in parts if part is not None]


def names_of(node: ast.stmt) -> Names:
    """The names that a top-level statement uses, what is for show in it left out."""
    names = Names()
    waiting: list[ast.AST] = [node]
    while waiting:
        part = waiting.pop()
        _note(part, names)
        if isinstance(part, _Function):
            _note_function(part, names)
            waiting += _signature(part)
            if not isinstance(part, ast.Lambda):
                names.binds.add(part.name)
        elif isinstance(part, ast.ClassDef):
            inside = [names_of(child) for child in part.body]
            own = set().union(*(each.binds for each in inside))
            for each in inside:
                names.reads |= each.reads - own
                names.later |= each.later
                names.later_changes |= each.later_changes
            names.binds.add(part.name)
            waiting += [*part.decorator_list, *part.bases, *part.keywords]
        else:
            waiting += [c for c in ast.iter_child_nodes(part) if not (isinstance(c, ast.stmt) and is_for_show(c))]
    return names


def _note_function(function: ast.AST, names: Names) -> None:
    """Adds to `later` what a function and those within it take from the module."""
    inside, is_global = Names(), set()
    for part in ast.walk(function):
        _note(part, inside)
        if isinstance(part, ast.Global):
            is_global |= set(part.names)
        elif isinstance(part, ast.arg):
            inside.binds.add(part.arg)
        elif part is not function and isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inside.binds.add(part.name)
    own = inside.binds - is_global
    names.later |= (inside.reads - own) | is_global
    names.later_changes |= (inside.changes - own) | is_global
