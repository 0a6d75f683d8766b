r"""From an answer in LaTeX to its value, by recursive descent, a method for each rule above those of `expressions`:

statement = clause {link clause}, link = "," ";" and or
clause    = measured; read twice where a plus-minus sign is in it
measured  = chain ["%"] {words}, the words being a unit
chain     = ratio {relation ratio}, relation = < > = \le \in \approx ...
ratio     = union {":" union}
union     = sum {set sign sum}, set sign = \cup \cap \setminus
group     = bracket chain {"," chain} bracket: an expression, a point, an interval, a set

What is not understood to the last token is `Unreadable`; nothing is evaluated as a program.
"""

from typing import Any

from .expressions import BRACKETS, Expressions
from .parts import Combined, Group, Measured, Relation, Table, Unreadable, expression
from .tokens import tokens

_RELATIONS = {
    **{"=": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "\\le": "<=", "\\leq": "<=", "\\ge": ">="},
    **{"\\geq": ">=", "\\leqslant": "<=", "\\geqslant": ">=", "\\lt": "<", "\\gt": ">", "\\ne": "!=", "\\neq": "!="},
    **{"\\in": "in", "\\approx": "~", "\\simeq": "~"},
}
_CLOSING = {*BRACKETS.values()}


def read(text: str, thousands: bool) -> Any:
    """The value of a whole answer.

    Raises:
      Unreadable: it was not understood to the last token, or is too large to be computed.
    """
    found = tokens(text, thousands)
    if len(found) > 400:
        raise Unreadable("too many tokens")
    reader = Reader(found)
    value = reader.statement()
    if reader.place < len(found):
        raise Unreadable(f"nothing can follow at {reader.next!r}")
    return value


class Reader(Expressions):
    """Statements, lists and what stands in brackets."""

    def statement(self) -> Any:
        """Values between commas, "and" and "or"."""
        parts: list[Any] = []
        links: set[str] = set()
        while True:
            parts += self.clause()
            link = ""
            while self.kind in ("and", "or") or self.next in (",", ";", "\\lor", "\\vee", "\\land", "\\wedge"):
                taken = self.found[self.place].text.lower()
                link = {"and": "and", "\\land": "and", "\\wedge": "and", ",": link or ",", ";": link or ","}.get(
                    taken, "or"
                )
                self.place += 1
            if not link:
                break
            links.add(link)
        if len(parts) == 1:
            return parts[0]
        how = "or" if "or" in links else "and" if "and" in links else ","
        return Combined(how, parts) if any(isinstance(part, Relation) for part in parts) else Group(",", parts)

    def clause(self) -> list[Any]:
        """One value with its unit, or two where a plus-minus sign is in it."""
        start, found, self.plus, self.both = self.place, list(self.found), 1, False
        values = [self.measured()]
        if self.both:
            self.place, self.found, self.plus = start, found, -1
            values.append(self.measured())
        return values

    def measured(self) -> Any:
        value = self.chain()
        words = ["percent"] if self.take("\\%", "%") else []
        while self.kind == "words":
            words.append(self.next)
            self.place += 1
            if self.take("^"):
                words.append(str(self.exponent()))
        if not words:
            return value
        if isinstance(value, Relation):
            return Relation([*value.sides[:-1], Measured(expression(value.sides[-1]), " ".join(words))], value.signs)
        clock = isinstance(value, Group) and value.kind == ":"
        return Measured(value if clock else expression(value), " ".join(words))

    def chain(self) -> Any:
        self.take("\\approx") if self.place == 0 else None
        sides, signs = [self.ratio()], []
        while self.next in _RELATIONS and self.kind != "words":
            signs.append(_RELATIONS[self.next])
            self.place += 1
            sides.append(self.ratio())
        return Relation(sides, signs) if signs else sides[0]

    def ratio(self) -> Any:
        parts = [self.union()]
        while self.take(":"):
            parts.append(self.union())
        return Group(":", parts) if len(parts) > 1 else parts[0]

    def union(self) -> Any:
        value = self.sum()
        while how := self.take("\\cup", "\\cap", "\\setminus", "\\backslash"):
            value = Combined(how[1:].replace("backslash", "setminus"), [value, self.sum()])
        return value

    def group(self, opening: str) -> Any:
        """What stands in brackets: one expression, or a point, an interval, a set."""
        bars, self.bars = self.bars, 0
        items: list[Any] = []
        while self.next not in _CLOSING:
            items.append(self.chain())
            if not self.take(",", ";"):
                break
        self.bars = bars
        closing = self.need(*sorted(_CLOSING))
        if opening in ("\\{", "\\lbrace"):
            if closing not in ("\\}", "\\rbrace") or any(isinstance(item, Relation) for item in items):
                raise Unreadable("no set of values")
            return Group("{}", items)
        if opening == "\\langle" or closing == "\\rangle":
            opening, closing = ("(", ")") if (opening, closing) == ("\\langle", "\\rangle") else ("", "")
        if closing not in (")", "]") or not items:
            raise Unreadable("brackets that do not match")
        if len(items) > 1:
            return Group(opening + closing, items)
        if BRACKETS[opening] != closing:
            raise Unreadable("brackets that do not match")
        return items[0]

    def table(self) -> Table:
        """A matrix or a vector."""
        name = self.raw()
        if name not in ("pmatrix", "bmatrix", "matrix", "array", "smallmatrix"):
            raise Unreadable(f"\\begin{{{name}}} is not known")
        if name == "array":
            self.raw()
        rows: list[list[Any]] = [[]]
        while not self.take("\\end"):
            if self.take("\\\\"):
                rows.append([])
            elif not self.take("&"):
                rows[-1].append(expression(self.sum()))
        if self.raw() != name:
            raise Unreadable("a matrix that is not closed")
        return Table([row for row in rows if row])
