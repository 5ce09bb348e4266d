"""The value of an expression at a point: an exact fraction as long as possible, else complex.

    evaluate(("quotient", ("symbol", "x"), ("symbol", "y")), point=0) -> Fraction

Two expressions with letters are taken for equal when their values are, at several points. A point
gives every letter a value of its own, the same in each process. Trees are those of latex.py. Values
that would take for ever to compute are refused: the text may be hostile.
"""

import cmath
import math
import operator
import random
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from grading.latex import TooLargeError, UnreadableError

MAX_BITS = 20_000  # of an integer on the way to a value
MAX_COMBINATORIAL = 2_000  # largest argument of a factorial or binomial
ROUNDING = 1e-13  # a sum this small beside its largest term is what rounding left of zero
CONSTANTS = {"e": complex(math.e), "i": 1j, r"\pi": complex(math.pi)}
N_NARROW_POINTS = (
    10  # points 0 to 9: values of their own order of magnitude; the others spread up to 70
)
MAGNITUDES = (1, 7, 3, 2, 5)  # of points 0 and 1, 2 and 3, ...

Value = Fraction | complex


@lru_cache(4096)
def letter_value(name: str, point: int) -> Fraction:
    """Return the value of a letter at a point; it is negative at the points 1, 3, 5, 7 and 9."""
    if point >= N_NARROW_POINTS:
        return Fraction(random.Random(f"{name} {point}").randint(1, 5000), 73)
    pair, is_negative = divmod(point, 2)
    factor = Fraction(random.Random(f"{name} {pair}").randint(40, 160), 73)
    value = MAGNITUDES[pair] * factor
    return -value if is_negative else value


def is_exact(value: Value) -> bool:
    return isinstance(value, Fraction)


def check_size(value: Value | float) -> Value:
    """Return a value as it is; TooLargeError if it has too many digits or is not finite."""
    if is_exact(value):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
            raise TooLargeError("too many digits")
        return value
    value = complex(value)
    if not cmath.isfinite(value):
        raise TooLargeError("not finite")
    return value


def to_complex(value: Value) -> complex:
    """Convert a value to a complex number; TooLargeError if it does not fit."""
    try:
        converted = complex(value)
    except OverflowError as error:
        raise TooLargeError("too large for a float") from error
    if converted == 0 and value != 0:
        raise TooLargeError("too small for a float")
    return converted


def are_close(a: Value, b: Value, tolerance: Fraction) -> bool:
    """Return whether two values are equal to a ratio; with 0, exact values must be equal."""
    if is_exact(a) and is_exact(b):
        return abs(a - b) <= tolerance * max(abs(a), abs(b))
    a = to_complex(a)
    b = to_complex(b)
    return abs(a - b) <= max(float(tolerance), 1e-9) * max(abs(a), abs(b))


# ---- Expressions
def evaluate(node: tuple, point: int, in_angle: bool = False) -> Value:
    """Return the value of an expression.

    Args:
        node: A tree, as latex.py reads it.
        point: Number of the point, from 0 to 49; see letter_value.
        in_angle: Whether it is the argument of a trigonometric function: there a degree is pi/180,
            elsewhere 1.

    Raises:
        TooLargeError: The value is too large to compute.
        UnreadableError: There is no value, e.g. since the tree is a list.
    """
    kind = node[0]
    if kind == "number":
        return node[1]
    if kind == "symbol":
        return symbol_value(node[1], point)
    if kind == "degree":
        value = evaluate(node[1], point)
        return to_complex(value) * math.pi / 180 if in_angle else value
    if kind == "sum":
        return add([evaluate(term, point, in_angle) for term in node[1:]])
    if kind == "product":
        value = evaluate(node[1], point, in_angle)
        for factor in node[2:]:
            value = combine(value, evaluate(factor, point, in_angle), operator.mul)
        return value
    if kind == "quotient":
        return divide(evaluate(node[1], point, in_angle), evaluate(node[2], point, in_angle))
    if kind == "ratio" and len(node) == 3:
        return divide(evaluate(node[1], point), evaluate(node[2], point))
    if kind == "clock":  # compared with something else than a clock time, it is a ratio
        return divide(Fraction(node[1]), Fraction(node[2]))
    if kind == "power":
        return power(evaluate(node[1], point), evaluate(node[2], point))
    if kind == "call":
        function = node[1]
        takes_angle = function in ANGLE_FUNCTIONS
        return call(function, [evaluate(part, point, takes_angle) for part in node[2:]])
    raise UnreadableError(f"{kind} has no value")


def symbol_value(name: str, point: int) -> Value:
    if name in CONSTANTS:
        return CONSTANTS[name]
    return letter_value(name, point)


def combine(a: Value, b: Value, operation: Callable) -> Value:
    """Multiply or divide two values, exactly where both are exact."""
    if is_exact(a) and is_exact(b):
        return check_size(operation(a, b))
    return check_size(operation(to_complex(a), to_complex(b)))


def add(terms: list[Value]) -> Value:
    if all(is_exact(term) for term in terms):
        return check_size(sum(terms))
    terms = [to_complex(term) for term in terms]
    total = sum(terms)
    largest = max(abs(term) for term in terms)
    return Fraction(0) if abs(total) <= ROUNDING * largest else check_size(total)


def divide(top: Value, bottom: Value) -> Value:
    if bottom == 0:
        raise UnreadableError("division by zero")
    return combine(top, bottom, operator.truediv)


def power(base: Value, exponent: Value) -> Value:
    """Return base ** exponent; odd roots of negative numbers are negative."""
    if is_exact(base) and is_exact(exponent):
        if exponent.denominator == 1:
            return integer_power(base, int(exponent))
        if base < 0 and exponent.denominator % 2 == 1:
            value = power(-base, exponent)
            return -value if exponent.numerator % 2 == 1 else value
        if exponent.denominator == 2:
            root = exact_square_root(base)
            if root is not None:
                return power(root, Fraction(exponent.numerator))
    try:
        return check_size(to_complex(base) ** to_complex(exponent))
    except (OverflowError, ZeroDivisionError) as error:
        raise TooLargeError("too large a power") from error


def integer_power(base: Fraction, exponent: int) -> Fraction:
    n_bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * n_bits > MAX_BITS and abs(base) != 1:
        raise TooLargeError("too large a power")
    if base == 0 and exponent < 0:
        raise UnreadableError("division by zero")
    return Fraction(base**exponent)


def exact_square_root(value: Fraction) -> Fraction | None:
    """Return the root of a positive square of a fraction, None for another value."""
    if value <= 0:
        return None
    top = math.isqrt(value.numerator)
    bottom = math.isqrt(value.denominator)
    is_square = top**2 == value.numerator and bottom**2 == value.denominator
    return Fraction(top, bottom) if is_square else None


# ---- Functions
def cot(z: complex) -> complex:
    return 1 / cmath.tan(z)


def sec(z: complex) -> complex:
    return 1 / cmath.cos(z)


def csc(z: complex) -> complex:
    return 1 / cmath.sin(z)


ANGLE_FUNCTIONS = ("sin", "cos", "tan", "cot", "sec", "csc")
COMPLEX_FUNCTIONS = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": cot,
    "sec": sec,
    "csc": csc,
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "sinh": cmath.sinh,
    "cosh": cmath.cosh,
    "tanh": cmath.tanh,
    "arcsinh": cmath.asinh,
    "arccosh": cmath.acosh,
    "arctanh": cmath.atanh,
    "ln": cmath.log,
    "exp": cmath.exp,
    "abs": abs,
}
EXACT_FUNCTIONS = {"floor": math.floor, "ceil": math.ceil, "abs": abs}  # of one fraction
EXTREMES = {"min": min, "max": max}  # of any number of fractions
INTEGER_FUNCTIONS = {
    "gcd": math.gcd,
    "lcm": math.lcm,
    "binom": math.comb,
    "factorial": math.factorial,
}


def call(function: str, values: list[Value]) -> Value:
    """Return a function's value."""
    are_exact = all(is_exact(value) for value in values)
    if are_exact and function in EXACT_FUNCTIONS:
        return Fraction(EXACT_FUNCTIONS[function](values[0]))
    if are_exact and function in EXTREMES:
        return EXTREMES[function](values)
    if function in ("floor", "ceil") and to_complex(values[0]).imag == 0:
        return round_float(function, to_complex(values[0]).real)
    if function in INTEGER_FUNCTIONS:
        return call_on_integers(function, values)
    if function in ("log", "lg"):
        return logarithm(values)
    if function not in COMPLEX_FUNCTIONS or len(values) > 1:
        raise UnreadableError(f"{function} of {len(values)} arguments")
    return call_on_complex(function, values[0])


def round_float(function: str, value: float) -> Fraction:
    """Return the floor or ceiling of a float; one that is next to an integer is that integer."""
    nearest = round(value)
    if abs(value - nearest) < 1e-9:
        return Fraction(nearest)
    return Fraction(EXACT_FUNCTIONS[function](value))


def call_on_integers(function: str, values: list[Value]) -> Value:
    are_integers = all(is_exact(value) and value.denominator == 1 for value in values)
    if not are_integers:
        if function == "factorial" or (function == "binom" and len(values) == 2):
            return call_by_gamma(function, values)
        raise UnreadableError(f"{function} of what is no integer")
    is_bounded = function in ("gcd", "lcm") or max(map(abs, values)) <= MAX_COMBINATORIAL
    if not is_bounded or min(values) < 0:
        raise TooLargeError(f"too large a {function}")
    integers = [int(value) for value in values]
    return check_size(Fraction(INTEGER_FUNCTIONS[function](*integers)))


def call_by_gamma(function: str, values: list[Value]) -> Value:
    """Continue factorials and binomials to the fractions that letters stand for."""
    if any(to_complex(value).imag for value in values):
        raise UnreadableError(f"{function} of a complex number")
    try:
        factorials = [gamma_factorial(value) for value in values]
        if function == "factorial":
            return check_size(factorials[0])
        top, bottom = values
        return check_size(factorials[0] / factorials[1] / gamma_factorial(top - bottom))
    except (ValueError, OverflowError, ZeroDivisionError) as error:
        raise UnreadableError(f"{function} has no value there") from error


def gamma_factorial(value: Value) -> float:
    return math.gamma(to_complex(value).real + 1)


def logarithm(values: list[Value]) -> Value:
    """Return the logarithm of the first value to the base of the second, by default 10."""
    has_base = len(values) > 1
    base = to_complex(values[1]) if has_base else 10.0
    if base in (0, 1):
        raise UnreadableError("a logarithm to no base")
    divisor = cmath.log(base)
    if has_base and divisor == 1:  # base e is left to math-verify
        raise UnreadableError("a natural logarithm written as log_e")
    return call_on_complex("ln", values[0], divisor)


def call_on_complex(function: str, argument: Value, divisor: complex = 1) -> Value:
    """Return a function's value over a divisor, without what rounding left of zero."""
    try:
        value = complex(COMPLEX_FUNCTIONS[function](to_complex(argument))) / divisor
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise UnreadableError(f"{function} has no value there") from error
    value = complex(drop_rounding(value.real), drop_rounding(value.imag))
    return check_size(value) if value != 0 else Fraction(0)


def drop_rounding(part: float) -> float:
    return 0.0 if abs(part) < 1e-15 else part
