"""What a compiled program does, read from its text: products, bytes moved, collectives, with loops multiplied out.

The compiler's own analysis counts the body of a loop once, which for scanned layers is a layer in place of all. Here
every computation is counted as often as the loops around it run. The text is what `compiled.as_text()` gives; shapes
in it are of one device.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

DTYPE_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
    "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128, "token": 0, "opaque": 0,
}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLS = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_RAGGED = "ragged_dot_tiling="  # what a TPU's kernel for `jax.lax.ragged_dot_general` is known by
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id"}


class Shape(NamedTuple):
    """One array of a device."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Without the padding of its layout."""
        return math.prod(self.dims) * DTYPE_BITS[self.dtype] // 8


class Instruction(NamedTuple):
    """One line."""

    name: str
    shapes: tuple[Shape, ...]  # of the result; more than one for a tuple
    opcode: str
    operands: tuple[str, ...]
    attributes: str  # what follows the operands
    is_root: bool


class Computation(NamedTuple):
    """One block of lines."""

    name: str
    is_entry: bool
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The line whose result is the block's."""
        return next(x for x in self.instructions.values() if x.is_root)


class Product(NamedTuple):
    """A matrix product (dot, or what TPUs have for it: a convolution, a ragged kernel), and how often it runs."""

    operands: tuple[Shape, ...]
    result: Shape
    flops: int  # of one run: 2 a multiply-add
    times: int
    source: str  # the traced operation, from its metadata


class Collective(NamedTuple):
    """A message between devices, and how often it is sent."""

    kind: str
    shapes: tuple[Shape, ...]  # of its result on one device
    bytes: int  # of one run: of the whole array that is gathered, reduced or exchanged on one device
    times: int
    source: str


class Analysis(NamedTuple):
    """A program of one device."""

    products: list[Product]
    collectives: list[Collective]
    bytes: int  # read and written by instructions, fused ones counted as one
    loops: dict[str, int]  # times that each loop's body runs in all, by the name of the body
    unknown: list[str]  # bodies whose loop has no fixed number of turns: see `analyse`

    @property
    def flops(self) -> int:
        """Of all products."""
        return sum(product.flops * product.times for product in self.products)

    def sent(self) -> dict[str, tuple[int, int]]:
        """{kind of collective: (times, bytes)}."""
        totals: dict[str, tuple[int, int]] = {}
        for item in self.collectives:
            times, size = totals.get(item.kind, (0, 0))
            totals[item.kind] = (times + item.times, size + item.times * item.bytes)
        return totals


def analyse(text: str, *, open_turns: int = 1, met: float = 1) -> Analysis:
    """What the program of this HLO text does.

    Args:
      text: an optimised module, as `compiled.as_text()` gives it.
      open_turns: how often a loop runs that stops on a condition, as decoding stops at the last row's end token.
      met: the share of a ragged product's rows that have a matrix on this device; the kernel passes over the others.
    """
    computations = parse(text)
    times: Counter[str] = Counter()
    fused: set[str] = set()
    loops: dict[str, int] = {}
    unknown: list[str] = []

    def visit(name: str, count: int, inside_fusion: bool) -> None:
        times[name] += count
        if inside_fusion:
            fused.add(name)
        for line in computations[name].instructions.values():
            if line.opcode == "while":
                body, condition = (_attribute(line, key) for key in ("body", "condition"))
                turns = _turns(computations[name], line, computations[body], computations[condition])
                if turns is None:
                    unknown.append(body)
                    turns = open_turns
                loops[body] = loops.get(body, 0) + count * turns
                visit(body, count * turns, inside_fusion)
                visit(condition, count * (turns + 1), inside_fusion)
            else:
                for callee in _callees(line):
                    visit(callee, count, inside_fusion or line.opcode not in ("call", "conditional"))

    entry = next(c for c in computations.values() if c.is_entry)
    visit(entry.name, 1, False)
    products, moved = [], 0
    messages: dict[object, Collective] = {}
    for name, computation in computations.items():
        if not times[name]:
            continue
        for line in computation.instructions.values():
            if line.opcode in ("dot", "convolution"):
                products.append(_product(computation, line, times[name]))
            elif line.opcode == "custom-call" and _RAGGED in line.attributes:
                products.append(_ragged(computation, line, times[name], met))
            kind = line.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                item = _collective(computation, line, kind, times[name])
                # One that runs beside other work is written in every fusion that it spans, some of them inside loops.
                channel = re.search(r"channel_id=(\d+)", line.attributes) if name in fused else None
                key = (channel[1], item.shapes) if channel else (name, line.name)
                if key not in messages or item.times < messages[key].times:
                    messages[key] = item
            if name not in fused:
                moved += times[name] * _moved(computations, computation, line)
    return Analysis(products, list(messages.values()), moved, loops, unknown)


def parse(text: str) -> dict[str, Computation]:
    """{name: Computation} of an HLO module's text."""
    found: dict[str, Computation] = {}
    current: Computation | None = None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = Computation(head[2], bool(head[1]), {})
            found[current.name] = current
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            instruction = _instruction(match[2], match[3], bool(match[1]))
            if instruction is not None:
                current.instructions[instruction.name] = instruction
    return found


def _instruction(name: str, rest: str, is_root: bool) -> Instruction | None:
    if rest.startswith("("):  # a tuple, whose layouts hold brackets of their own
        shape_text, rest = _bracketed(rest)
    else:
        shape_text, _, rest = rest.partition(" ")
    head = re.match(r"\s*([\w\-]+)\(", rest)
    if head is None:
        return None
    arguments, attributes = _bracketed(rest[head.end() - 1 :])
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    if head[1] in ("constant", "parameter"):
        attributes = arguments + attributes
    return Instruction(name, _shapes(shape_text), head[1], operands, attributes, is_root)


def _bracketed(text: str) -> tuple[str, str]:
    """(the part in the round brackets that it starts with, brackets included; what follows)."""
    depth = 0
    for place, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[: place + 1], text[place + 1 :]
    return text, ""


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _SHAPE.findall(text)
        if dtype in DTYPE_BITS
    )


def _attribute(line: Instruction, key: str) -> str:
    match = re.search(rf"\b{key}=%?([\w.\-]+)", line.attributes)
    assert match is not None, (line.name, key)
    return match[1]


def _callees(line: Instruction) -> Iterator[str]:
    if line.opcode in ("reduce", "scatter", "sort", "map", "reduce-window", "select-and-scatter", *COLLECTIVES):
        return  # their computations are of one number
    yield from _CALLS.findall(line.attributes)
    for group in _BRANCHES.findall(line.attributes):
        yield from re.findall(r"%([\w.\-]+)", group)


def _source(line: Instruction) -> str:
    match = re.search(r'op_name="([^"]*)"', line.attributes)
    return match[1] if match else ""


def _turns(around: Computation, loop: Instruction, body: Computation, condition: Computation) -> int | None:
    """How often a loop runs; None where that depends on what it computes."""
    if known := re.search(r'known_trip_count[^\d]*"?(\d+)', loop.attributes):
        return int(known[1])
    test = condition.root
    if test.opcode == "fusion":
        return None
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, bound = (condition.instructions[name] for name in test.operands)
    if counter.opcode != "get-tuple-element":
        return None
    place = int(re.findall(r"index=(\d+)", counter.attributes)[0])
    start = around.instructions[loop.operands[0]]
    first = _number(around, around.instructions[start.operands[place]]) if start.opcode == "tuple" else None
    if bound.opcode == "get-tuple-element" and start.opcode == "tuple":
        last = _number(
            around, around.instructions[start.operands[int(re.findall(r"index=(\d+)", bound.attributes)[0])]]
        )
    else:
        last = _number(condition, bound)
    if last is None:
        return None
    step = _step(body, place)
    return max(0, -(-(last - (first or 0)) // step))


def _number(around: Computation, line: Instruction) -> int | None:
    """The value of a scalar constant, perhaps copied."""
    while line.opcode in ("copy", "bitcast", "convert") and line.operands[0] in around.instructions:
        line = around.instructions[line.operands[0]]
    match = re.match(r"\((-?\d+)\)", line.attributes) if line.opcode == "constant" else None
    return int(match[1]) if match else None


def _step(body: Computation, place: int) -> int:
    """By how much a body raises its counter."""
    root = body.root
    if root.opcode != "tuple":
        return 1
    line = body.instructions[root.operands[place]]
    while line.opcode in ("copy", "bitcast"):
        line = body.instructions[line.operands[0]]
    if line.opcode != "add":
        return 1
    numbers = [_number(body, body.instructions[name]) for name in line.operands]
    return next((number for number in numbers if number), 1)


def _product(computation: Computation, line: Instruction, times: int) -> Product:
    operands = tuple(computation.instructions[name].shapes[0] for name in line.operands[:2])
    (result,) = line.shapes
    count = _dot_flops if line.opcode == "dot" else _convolution_flops
    return Product(operands, result, count(operands, result, line.attributes), times, _source(line))


def _ragged(computation: Computation, line: Instruction, times: int, met: float) -> Product:
    """Rows [M, K], each with one of the matrices [X, K, N] or [X, N, K]; what else the kernel is given says which."""
    operands = tuple(computation.instructions[name].shapes[0] for name in line.operands[-2:])
    (result,) = line.shapes
    rows, _ = operands
    return Product(operands, result, round(met * 2 * rows.dims[-1] * math.prod(result.dims)), times, _source(line))


def _dot_flops(operands: tuple[Shape, ...], result: Shape, attributes: str) -> int:
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)
    contracted = math.prod(operands[0].dims[int(n)] for n in (dims[1].split(",") if dims and dims[1] else []))
    return 2 * math.prod(result.dims) * contracted


def _convolution_flops(operands: tuple[Shape, ...], result: Shape, attributes: str) -> int:
    """2 a multiply-add that reads no padding: batched products are written as convolutions over mostly padding."""
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", attributes)
    assert labels is not None, attributes
    lhs, rhs, out = labels.groups()
    spatial = [c for c in out if c.isdigit()]
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", attributes) or [""])[0]))

    def each(key: str, default: str) -> list[str]:
        return window[key].split("x") if key in window else [default] * len(spatial)

    total = 2 * result.dims[out.index("b")] * result.dims[out.index("f")] * operands[1].dims[rhs.index("i")]
    strides, dilations, kernel_dilations, pads = (
        each(key, default)
        for key, default in (("stride", "1"), ("lhs_dilate", "1"), ("rhs_dilate", "1"), ("pad", "0_0"))
    )
    for i, axis in enumerate(spatial):
        size, kernel = operands[0].dims[lhs.index(axis)], operands[1].dims[rhs.index(axis)]
        stride, dilation, kernel_dilation = int(strides[i]), int(dilations[i]), int(kernel_dilations[i])
        low = int(pads[i].split("_")[0])
        reach = (size - 1) * dilation + 1
        total *= sum(
            0 <= at < reach and at % dilation == 0
            for o in range(result.dims[out.index(axis)])
            for at in (o * stride + w * kernel_dilation - low for w in range(kernel))
        )
    return total


def _collective(computation: Computation, line: Instruction, kind: str, times: int) -> Collective:
    shapes = line.shapes
    operands = [
        s for name in line.operands if name in computation.instructions for s in computation.instructions[name].shapes
    ]
    if line.opcode.endswith("-start") and len(shapes) > len(operands):  # (operands, results, ...)
        shapes = shapes[len(operands) : 2 * len(operands)]
    whole = operands if kind == "reduce-scatter" else shapes
    return Collective(kind, shapes, sum(shape.bytes for shape in whole), times, _source(line))


def _moved(computations: Mapping[str, Computation], computation: Computation, line: Instruction) -> int:
    """Bytes that one instruction outside fusions reads and writes; of a large array that is only cut into, the cut."""
    if line.opcode in (*_FREE, "while", "conditional", "call") or line.opcode.endswith("-done"):
        return 0
    written = sum(shape.bytes for shape in line.shapes)
    operands = [computation.instructions[name] for name in line.operands if name in computation.instructions]
    if line.opcode in ("dynamic-slice", "gather"):
        return 2 * written
    if line.opcode == "dynamic-update-slice":
        return 2 * sum(shape.bytes for shape in operands[1].shapes)
    reads = [sum(shape.bytes for shape in operand.shapes) for operand in operands]
    if line.opcode == "fusion":
        inner = computations[_attribute(line, "calls")]
        parameters = {
            int(x.attributes[1:].partition(")")[0]): x for x in inner.instructions.values() if x.opcode == "parameter"
        }
        users: dict[str, list[Instruction]] = defaultdict(list)
        for instruction in inner.instructions.values():
            for name in instruction.operands:
                users[name].append(instruction)
        for place, whole in enumerate(reads):
            if place in parameters:
                reads[place] = min(whole, _read(inner, users, parameters[place]))
        root = inner.root
        if root.opcode == "dynamic-update-slice":
            written = inner.instructions[root.operands[1]].shapes[0].bytes
    return written + sum(reads)


def _read(inner: Computation, users: Mapping[str, list[Instruction]], parameter: Instruction) -> int:
    """Bytes of a fusion's parameter that it reads."""
    total = 0
    for user in users[parameter.name]:
        if user.opcode == "bitcast":
            total += _read(inner, users, user)
        elif user.opcode in ("dynamic-slice", "gather") and user.operands[0] == parameter.name:
            total += sum(shape.bytes for shape in user.shapes)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            total += inner.instructions[user.operands[1]].shapes[0].bytes
        else:
            return sum(shape.bytes for shape in parameter.shapes)
    return total
