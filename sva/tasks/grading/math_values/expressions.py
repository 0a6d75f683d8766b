r"""Expressions in LaTeX: sums, products, powers, functions. Read by recursive descent, a method for each rule:

sum     = [sign] term {sign term}, sign = + - \pm \mp
term    = factor {[* or /] factor}; without a sign a product, but 2\frac{1}{2} is a mixed number
factor  = base {"^" exponent | "!" | degrees}
braced  = "{" sum "}", or one token
base    = number | letter ["_" index] | "(" ... ")" | "|" sum "|" | \command with its arguments | words
"""

import re
from typing import Any

import sympy

from .parts import DEGREE, Group, Unreadable, Words, binomial, expression, factorial, number, power
from .tokens import FUNCTIONS, Token

_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar"
)
GREEK = frozenset(_GREEK.split())
_CIRCULAR = ("sin", "cos", "tan", "cot", "sec", "csc")
_CALLED = {
    **{name: getattr(sympy, name) for name in (*_CIRCULAR, "sinh", "cosh", "tanh", "coth", "exp")},
    **{f"arc{name}": getattr(sympy, f"a{name}") for name in _CIRCULAR},
    "ln": sympy.log,
    **{"log": lambda x: sympy.log(x) / sympy.log(10), "lg": lambda x: sympy.log(x) / sympy.log(10)},
}
_INVERSE = {name: _CALLED[f"arc{name}"] for name in _CIRCULAR}
_OF_MANY = {"max": sympy.Max, "min": sympy.Min, "gcd": sympy.igcd, "lcm": sympy.ilcm}
BRACKETS = {"(": ")", "[": "]", "\\{": "\\}", "\\langle": "\\rangle", "\\lbrace": "\\rbrace"}


class Expressions:
    """Reads tokens from left to right; each method returns the value of what it took.

    What stands in brackets and tables can be more than an expression: `latex.Reader` reads those.
    """

    def __init__(self, found: list[Token]) -> None:
        self.found = found
        self.place = 0
        self.plus = 1  # what a plus-minus sign reads as
        self.both = False  # whether there was one
        self.bars = 0
        self.depth = 0

    # --- tokens ---

    @property
    def next(self) -> str:
        return self.found[self.place].text if self.place < len(self.found) else ""

    @property
    def kind(self) -> str:
        return self.found[self.place].kind if self.place < len(self.found) else ""

    def take(self, *texts: str) -> str:
        """The next token if it is one of these, which is then behind; else nothing."""
        if self.next in texts and self.kind not in ("words", ""):
            self.place += 1
            return self.found[self.place - 1].text
        return ""

    def need(self, *texts: str) -> str:
        if not (taken := self.take(*texts)):
            raise Unreadable(f"{' or '.join(texts)} expected before {self.next!r}")
        return taken

    # --- expressions ---

    def sum(self) -> Any:
        """Terms under plus and minus. A value that is no number, such as a set, can only stand alone."""
        self.depth += 1
        if self.depth > 60:
            raise Unreadable("too deeply nested")
        value = self.sign(self.take("+", "-", "\\pm", "\\mp"), self.term)
        while sign := self.take("+", "-", "\\pm", "\\mp"):
            value = expression(value) + expression(self.sign(sign, self.term))
        self.depth -= 1
        return value

    def sign(self, sign: str, part: Any) -> Any:
        if sign in ("\\pm", "\\mp"):
            self.both = True
            return self.plus * (1 if sign == "\\pm" else -1) * expression(part())
        return -expression(part()) if sign == "-" else expression(part()) if sign else part()

    def term(self) -> Any:
        literal = self.kind == "number"
        value = self.factor()
        while True:
            if self.take("*", "\\cdot", "\\times"):
                value = expression(value) * expression(self.signed_factor())
            elif self.take("/", "\\div"):
                divisor = expression(self.signed_factor())
                # 1/2x is half of x, but x/2y is x over 2y
                while not literal and self.is_factor() and self.found[self.place - 1].text != ")":
                    divisor *= expression(self.factor())
                value = expression(value) / divisor
            elif self.is_factor():
                value = self.beside(value, literal)
            else:
                return value
            literal = False

    def beside(self, value: Any, first: bool) -> Any:
        """A product without a sign; a whole number before a fraction is a mixed number."""
        before, start = self.found[self.place - 1], self.place
        if self.kind == "number" and before.kind in ("number", "letter"):
            above, slash, below = ([*(token.text for token in self.found[start : start + 3]), "", ""])[:3]
            mixed = first and slash == "/" and all(text.isdigit() for text in (before.text, above, below))
            if not mixed or not 0 < int(above) < int(below):
                raise Unreadable("a number beside what it may multiply or belong to")
            self.place += 3
            return value + sympy.Rational(int(above), int(below))
        right = expression(self.factor())
        source = "".join(token.text for token in self.found[start : self.place])
        mixed = first and before.text.isdigit() and re.fullmatch(r"\\frac[{}\d]+", source) is not None
        return value + right if mixed and 0 < right < 1 else expression(value) * right

    def is_factor(self) -> bool:
        """Whether the next token can begin a factor of a product."""
        if self.kind in ("number", "letter"):
            return True
        if self.kind == "sign":
            return self.next in ("(", "{") or (self.next == "|" and self.bars == 0)
        name = self.next[1:]
        known = name in FUNCTIONS or name in GREEK or name in ("lfloor", "lceil", "pi", "imath")
        return self.kind == "command" and (
            known or name in ("frac", "sqrt", "binom", "overline", "bar", "vec", "hat", "cfrac")
        )

    def signed_factor(self) -> Any:
        return -expression(self.factor()) if self.take("-") else self.factor()

    def factor(self) -> Any:
        value = self.base()
        while True:
            if self.next == "^":
                self.place += 1
                if self.degrees():
                    value = expression(value) * DEGREE
                else:
                    value = power(expression(value), expression(self.exponent()))
                    if self.next == "^":
                        raise Unreadable("a power of a power without brackets")
            elif self.take("\\degree", "\\degrees"):
                value = expression(value) * DEGREE
            elif self.take("!"):
                if self.next == "!":
                    raise Unreadable("a double factorial")
                value = factorial(expression(value))
            else:
                return value

    def degrees(self) -> bool:
        ahead = [token.text for token in self.found[self.place : self.place + 3]]
        taken = 1 if ahead[:1] == ["\\circ"] else 3 if ahead == ["{", "\\circ", "}"] else 0
        self.place += taken
        return taken > 0

    def exponent(self) -> Any:
        """After ^: a group, or a signed number or symbol alone."""
        if self.next == "{":
            return self.braced()
        if self.take("-"):
            return -expression(self.exponent())
        if self.take("+"):
            return self.exponent()
        return self.base()

    def braced(self) -> Any:
        """{...} as one expression; without braces one token, and of a number its first digit, as TeX has it."""
        if self.take("{"):
            bars, self.bars = self.bars, 0
            value = self.sum()
            if self.take("\\choose"):
                value = binomial(expression(value), expression(self.sum()))
            self.bars = bars
            self.need("}")
            return value
        if self.kind == "number" and self.next.isdigit():
            digit, rest = self.next[0], self.next[1:]
            if rest:
                self.found[self.place] = Token("number", rest)
            else:
                self.place += 1
            return sympy.Integer(digit)
        return self.base()

    # --- what an expression is made of ---

    def base(self) -> Any:
        kind, text = self.kind, self.next
        self.place += 1
        if kind == "number":
            return self.repeating(text) if self.next in ("\\overline", "\\bar", "\\dot") else number(text)
        if kind == "letter":
            return self.symbol(text)
        if kind == "sign" and text == "{":
            self.place -= 1
            return self.braced()
        if text in BRACKETS and kind in ("sign", "command"):
            return self.group(text)
        if kind == "sign" and text == "|":
            self.bars += 1
            value = sympy.Abs(expression(self.sum()))
            self.need("|")
            self.bars -= 1
            return value
        if kind == "words":
            return Words(text)
        if kind == "command":
            return self.command(text[1:])
        raise Unreadable(f"{text!r} cannot stand here" if text else "it ends too early")

    def repeating(self, text: str) -> Any:
        """0.1\\overline{6}: the digits under the line repeat for ever."""
        digits = ""
        while self.take("\\overline", "\\bar", "\\dot"):
            self.need("{") if self.next == "{" else None
            digits += self.next
            self.place += 1
            self.take("}")
        if "." not in text or not digits.isdigit():
            raise Unreadable("a line over what does not repeat")
        decimals = len(text.partition(".")[2])
        return number(text) + sympy.Rational(int(digits), (10 ** len(digits) - 1) * 10**decimals)

    def symbol(self, name: str) -> Any:
        """A variable with its subscript and primes; e and i are the constants."""
        if self.take("_"):
            name += f"_{self.raw()}"
        while self.take("'"):
            name += "'"
        if self.next == "(" and name in ("f", "g", "h") and not self.found[self.place].spaced:
            return sympy.Symbol(name + self.raw())
        return {"e": sympy.E, "i": sympy.I}.get(name) or sympy.Symbol(name)

    def raw(self) -> str:
        """The text of a token or of a group, as part of a name."""
        if self.next not in ("{", "("):
            self.place += 1
            return self.found[self.place - 1].text if self.place <= len(self.found) else ""
        depth, start = 0, self.place
        while self.place < len(self.found):
            depth += (self.next in ("{", "(")) - (self.next in ("}", ")"))
            self.place += 1
            if depth == 0:
                inside = self.found[start : self.place]
                inside = inside[1:-1] if inside[0].text == "{" else inside
                return "".join(token.text for token in inside)
        raise Unreadable("a bracket that is not closed")

    def command(self, name: str) -> Any:
        if name in ("angle", "triangle", "measuredangle"):
            return self.factor()
        constants = {"pi": sympy.pi, "infty": sympy.oo, "imath": sympy.I}
        if name in constants:
            return constants[name]
        if name in ("emptyset", "varnothing"):
            return Group("{}", [])
        if name in GREEK:
            return self.symbol(f"\\{name}")
        if name in ("frac", "cfrac"):
            above = expression(self.braced())
            return above / expression(self.braced())
        if name == "binom":
            above = expression(self.braced())
            return binomial(above, expression(self.braced()))
        if name == "sqrt":
            return self.root()
        if name in ("lfloor", "lceil"):
            value = expression(self.sum())
            self.need("\\rfloor" if name == "lfloor" else "\\rceil")
            return (sympy.floor if name == "lfloor" else sympy.ceiling)(value)
        if name == "mathbb":
            return Words(f"\\mathbb{{{self.raw()}}}")
        if name in ("overline", "bar", "vec", "hat"):
            return sympy.Symbol(f"\\{name}{{{self.raw()}}}")
        if name == "begin":
            return self.table()
        if name in FUNCTIONS:
            return self.function(name)
        raise Unreadable(f"\\{name} is not known")

    def root(self) -> Any:
        index = sympy.Integer(2)
        if self.take("["):
            index = expression(self.sum())
            self.need("]")
        alone = self.kind == "number" or self.next == "("
        inside = expression(self.base() if alone else self.braced())
        return power(inside, 1 / index)

    def function(self, name: str) -> Any:
        base = exponent = None
        while self.next in ("^", "_"):
            if self.take("_"):
                last = self.place == len(self.found) - 1  # \\log_28
                base = expression(self.braced() if self.next == "{" or last else self.base())
            else:
                self.place += 1
                exponent = expression(self.exponent())
        if name in _OF_MANY:
            given = self.base()
            items = given.items if isinstance(given, Group) else [given]
            items = [expression(item) for item in items]
            if not all(item.is_Integer if name in ("gcd", "lcm") else item.is_extended_real for item in items):
                raise Unreadable(f"{name} of what are no such numbers")
            return sympy.sympify(_OF_MANY[name](*items)) if len(items) > 1 else items[0]
        argument = self.argument().subs(DEGREE, sympy.pi / 180)
        call = _CALLED.get(name)
        if call is None:
            raise Unreadable(f"\\{name} is not known")
        if exponent == -1:
            if name not in _INVERSE:
                raise Unreadable(f"\\{name}^{{-1}} is not known")
            return _INVERSE[name](argument)
        if base is not None and name != "log":
            raise Unreadable(f"\\{name} with a base")
        if name == "exp":
            return power(sympy.E, argument)
        value = call(argument) if base is None else sympy.log(argument) / sympy.log(base)
        return value if exponent is None else power(value, exponent)

    def argument(self) -> Any:
        """Brackets alone, else the product that follows, up to the next function."""
        if self.next in ("(", "{"):
            value = expression(self.factor()) if self.next == "{" else expression(self.base())
            return value * DEGREE if self.next == "^" and self._circled() else value
        value = expression(self.signed_factor())
        while self.is_factor() and self.next not in ("(", "|") and self.next[1:] not in FUNCTIONS:
            value *= expression(self.factor())
        return value

    def _circled(self) -> bool:
        place = self.place
        self.place += 1
        if self.degrees():
            return True
        self.place = place
        return False

    # --- what only whole answers hold ---

    def group(self, opening: str) -> Any:
        raise NotImplementedError

    def table(self) -> Any:
        raise NotImplementedError
