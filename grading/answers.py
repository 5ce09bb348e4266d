r"""Are two mathematical answers the same? Read both into trees (latex.py), compare them by meaning.

    equal("\\frac{1}{2}", "0.5") -> True
    equal("(1,2)", "\\{1,2\\}") -> False

These are the same:
    spellings: sizes, fonts, spaces, dollars, degrees, thousands, units, `x =`, `the answer is`
    numbers of equal value: integers and fractions exactly, decimals to a ratio of 1e-6
    an irrational gold and a decimal of seven right significant digits
    ratios; times of day with the same digits
    expressions of equal value, at points chosen for their letters (values.py)
    lists and sets in any order; tuples and intervals with the same brackets in the same order
    matrices cell by cell
    numerals in the same base
    equations up to a factor; inequalities and the intervals that they describe

Gold and prediction are both read as mathematics. (The official code reads bare text: 51 of 500
MATH-500 answers then fail against themselves, and `2` passes for `2\pi`.)
"""

import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import combinations, pairwise, product
from operator import truediv
from typing import NamedTuple

from grading.latex import (
    CHOICE,
    QUALIFIERS,
    Answer,
    TooLargeError,
    UnreadableError,
    negative,
    read,
    spell,
    unit_of,
)
from grading.units import forgets_power
from grading.values import (
    N_NARROW_POINTS,
    Value,
    are_close,
    combine,
    evaluate,
    is_exact,
    to_complex,
)

Gold = str | Sequence[str]  # an answer, or a list of answers any of which will do

MAX_LENGTH = 2_000  # characters of an answer; a longer one is wrong
MAX_ITEMS = 100  # of a list
TOLERANCE = Fraction(1, 10**6)  # largest ratio of difference to value where a decimal is involved
NEARLY = Fraction(1, 20)  # the same between the sides of `\approx`
EXACT = Fraction(0)
CONTENT = re.compile(r"[^\W_]|\\infty|\\emptyset|\\varnothing|∞|∅|\\\{")  # every answer has some
EMPTY_COMMAND = re.compile(r"\\[A-Za-z]+\s*\{\s*\}")  # `\text{}`
CHOICE_LETTERS = "ABCDEFGHIJ"


# ---- Whole answers
def equal(gold: str, prediction: str) -> bool | None:
    """Return whether two answers are the same, None if it takes more than this reader to tell."""
    if len(prediction) > MAX_LENGTH or not CONTENT.search(prediction):
        return False
    if squeeze(gold) == squeeze(prediction):
        return True
    if bool(QUALIFIERS.search(gold)) != bool(QUALIFIERS.search(prediction)):
        return False
    try:
        pairs = product(read(gold), read(prediction))
        verdicts = [same_answer(gold_reading, reading) for gold_reading, reading in pairs]
    except (UnreadableError, RecursionError):
        return None
    if True in verdicts:
        return True
    return None if None in verdicts else False


def can_be_met(gold: str) -> bool:
    """Return whether any prediction can equal a gold answer: it says something."""
    filled = EMPTY_COMMAND.sub("", gold)
    return bool(CONTENT.search(filled) and CONTENT.search(squeeze(filled)))


def squeeze(text: str) -> str:
    """Take out of an answer the spellings and the spaces that make no difference."""
    text = spell(text)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)  # all but between digits: 1 1/2 is not 11/2


def same_answer(gold: Answer, prediction: Answer) -> bool | None:
    """Compare two readings, units and percent signs too; None if a value cannot be computed."""
    factor = unit_factor(gold.unit, prediction.unit)
    if factor is None:
        return False
    prediction_in_gold_unit = prediction._replace(node=scale(prediction.node, factor))
    try:
        return same_but_for_percent(gold, prediction_in_gold_unit)
    except TooLargeError:
        are_both_too_large = is_too_large(gold.node) and is_too_large(prediction.node)
        return None if are_both_too_large else False
    except UnreadableError:
        return None


def unit_factor(gold: str | None, prediction: str | None) -> Fraction | None:
    """Return the factor from a prediction's unit to the gold's, None if they contradict each other.

    A unit that only one of the two has is taken for the other's as well.
    """
    if not gold or not prediction:
        return Fraction(1)
    known_gold = unit_of(gold)
    known_prediction = unit_of(prediction)
    if known_gold and known_prediction:
        gold_dimension, gold_size = known_gold
        dimension, size = known_prediction
        if gold_dimension == dimension:
            return size / gold_size
        return Fraction(1) if forgets_power(gold, prediction) else None
    if not known_gold and not known_prediction and unit_words(gold) != unit_words(prediction):
        return None
    return Fraction(1)


def unit_words(unit: str) -> list[str]:
    """Return the words of a unit that is not known, without plurals and dots."""
    return [word.rstrip("s") for word in re.findall(r"[a-z]+", unit.lower().replace(".", ""))]


def same_but_for_percent(gold: Answer, prediction: Answer) -> bool:
    """Compare two readings in the same unit; 50 % is 0.5, and may be given as 50."""
    hundredth = Fraction(1, 100)
    if gold.percent and not prediction.percent:
        if same(gold.node, prediction.node):
            return True
        return same(scale(gold.node, hundredth), prediction.node)
    if prediction.percent and not gold.percent:
        if same(gold.node, scale(prediction.node, hundredth)):
            return True
        if not same(gold.node, prediction.node):
            return False
        return abs(to_complex(evaluate(gold.node, 0))) >= 1  # a gold in per cent
    return same(gold.node, prediction.node)


def is_too_large(node: tuple) -> bool:
    """Return whether a value cannot be computed because of its size."""
    try:
        evaluate(node, 0)
    except TooLargeError:
        return True
    except UnreadableError:
        return False
    return False


def scale(node: tuple, factor: Fraction) -> tuple:
    return node if factor == 1 else ("product", node, ("number", factor, None))


# ---- What a tree contains
def any_part(node, is_wanted: Callable[[tuple], bool]) -> bool:
    """Return whether a tree, or any tree in it, passes a test."""
    if not isinstance(node, tuple) or not node:
        return False
    return is_wanted(node) or any(any_part(part, is_wanted) for part in node)


def contains(node: tuple, *kinds: str) -> bool:
    """Return whether a tree has a node of one of some kinds."""
    return any_part(node, lambda part: part[0] in kinds)


def calls(node: tuple, *functions: str) -> bool:
    """Return whether a tree has a call of one of some functions."""
    return any_part(node, lambda part: part[0] == "call" and part[1] in functions)


def has_decimal(node: tuple) -> bool:
    return any_part(node, lambda part: part[0] == "number" and part[2] is not None)


def last_places(node: tuple) -> list[Fraction]:
    """Return the last places of all decimals in a tree, as ratios to the decimals."""
    if not isinstance(node, tuple) or not node:
        return []
    if node[0] == "number":
        return [] if node[2] is None else [node[2]]
    places = []
    for part in node:
        places += last_places(part)
    return places


def letters_of(node) -> set[str]:
    """Return the names of the letters in a tree that stand for something unknown."""
    if not isinstance(node, tuple) or not node:
        return set()
    if node[0] == "symbol":
        return {node[1]} - {"e", "i", r"\pi"}
    letters = set()
    for part in node[1:]:  # after the kind; of a matrix's row, after the first cell
        letters.update(letters_of(part))
    return letters


# ---- Trees
STRUCTURES = ("group", "matrix", "numeral", "union", "intersection", "difference")


def same(a: tuple, b: tuple, strict: bool = False) -> bool:
    """Compare the trees of a gold and a prediction.

    With `strict`, names before an equals sign must agree: in `x=1, y=2` each value belongs to its
    letter.
    """
    if a == b:
        return True
    if is_collection(a) or is_collection(b) or contains(a, "pm") or contains(b, "pm"):
        return same_items(a, b, strict)
    kinds = (a[0], b[0])
    if "relation" in kinds:
        return same_where_related(a, b, strict)
    are_choices = kinds == ("symbol", "symbol") and a[1] in CHOICE_LETTERS
    if "text" in kinds or are_choices:
        words = words_of(a)
        return words is not None and words == words_of(b)
    if a[0] in STRUCTURES or b[0] in STRUCTURES:
        return a[0] == b[0] and same_structure(a, b)
    if kinds == ("clock", "clock"):  # compared digit by digit: 12:30 is not 24:60
        return False
    if is_long_ratio(a) or is_long_ratio(b):
        return a[0] == b[0] and same_ratio(a[1:], b[1:])
    if contains(a, "infinity") or contains(b, "infinity"):
        return same_value(name_infinity(a), name_infinity(b))
    return same_value(a, b)


def words_of(node: tuple) -> str | None:
    """Return the words, or the letter of a choice, that a node stands for, or None."""
    if node[0] == "text":
        choice = CHOICE.fullmatch(node[1])
        return choice[1].lower() if choice else node[1]
    if node[0] == "symbol" and node[1].isalpha():
        return node[1].lower()
    return None


def same_structure(a: tuple, b: tuple) -> bool:
    """Compare two nodes of the same kind among STRUCTURES, part by part."""
    kind = a[0]
    if kind == "numeral":
        return a == b
    if kind == "matrix":
        return same_matrix(a[1:], b[1:])
    if kind == "group":
        return a[1:3] == b[1:3] and same_in_order(a[3:], b[3:])
    if kind == "difference":
        return same_in_order(a[1:], b[1:])
    parts_a = list(flatten(a, kind))
    parts_b = list(flatten(b, kind))
    return len(parts_a) == len(parts_b) and same_in_any_order(parts_a, parts_b)


def same_matrix(rows_a: Sequence[tuple], rows_b: Sequence[tuple]) -> bool:
    if [len(row) for row in rows_a] != [len(row) for row in rows_b]:
        return False
    return all(same_in_order(x, y) for x, y in zip(rows_a, rows_b, strict=True))


def is_long_ratio(node: tuple) -> bool:
    """Return whether a node is a ratio of three terms or more; one of two is their quotient."""
    return node[0] == "ratio" and len(node) > 3


def same_ratio(terms_a: Sequence[tuple], terms_b: Sequence[tuple]) -> bool:
    """Return whether two ratios are equal: 1:2:3 is 2:4:6."""
    zeros_a = [evaluate(term, 0) == 0 for term in terms_a]
    zeros_b = [evaluate(term, 0) == 0 for term in terms_b]
    if zeros_a != zeros_b:
        return False
    for i, j in combinations(range(len(terms_a)), 2):
        if not same_value(("product", terms_a[i], terms_b[j]), ("product", terms_a[j], terms_b[i])):
            return False
    return True


def flatten(node: tuple, kind: str) -> Iterator[tuple]:
    """Yield the sets that a chain of one operation joins."""
    if node[0] == kind:
        for part in node[1:]:
            yield from flatten(part, kind)
    else:
        yield node


def name_infinity(node):
    """Make infinity a letter of its own: equal to itself, and to nothing else."""
    if not isinstance(node, tuple) or not node:
        return node
    if node == ("infinity",):
        return ("symbol", r"\infty")
    return tuple(name_infinity(part) for part in node)


# ---- Lists and sets
def is_collection(node: tuple) -> bool:
    return node[0] == "list" or (node[0] == "group" and node[1] == "{")


def same_items(a: tuple, b: tuple, strict: bool) -> bool:
    """Compare where at least one side is a list or a set, or has a plus-minus sign."""
    items_a = items_of(a)
    items_b = items_of(b)
    is_set = any(is_collection(node) and node[0] == "group" for node in (a, b))
    if is_set:  # it holds each thing once
        items_a = list(dict.fromkeys(items_a))
        items_b = list(dict.fromkeys(items_b))
    if len(items_a) != len(items_b):
        return False
    if len(items_a) == 1:
        return same(items_a[0], items_b[0])
    are_names_left_out = names_each(items_a) and names_none(items_b)
    are_names_added = names_none(items_a) and names_each(items_b)
    if are_names_left_out or are_names_added:  # x = 1, y = 2 is 1, 2 in this order
        return same_in_order(items_a, items_b)
    strict = strict or all(is_named(item) for item in (*items_a, *items_b))
    return same_in_any_order(items_a, items_b, strict)


def names_each(items: Sequence[tuple]) -> bool:
    """Return whether all items are named, each differently."""
    return all(is_named(item) for item in items) and len({item[2] for item in items}) == len(items)


def names_none(items: Sequence[tuple]) -> bool:
    return not any(is_named(item) for item in items)


def items_of(node: tuple) -> list[tuple]:
    """Return the items of a list or set, or the one thing itself.

    What has a plus-minus sign is two items.
    """
    if node[0] == "list":
        listed = node[1:]
    elif is_collection(node):
        listed = node[3:]
    else:
        listed = (node,)
    if len(listed) > MAX_ITEMS:
        raise UnreadableError("too many items")
    items = []
    for item in listed:
        if contains(item, "pm"):
            items += [choose_sign(item, 1), choose_sign(item, -1)]
        else:
            items.append(item)
    has_later_relation = any(item[0] == "relation" for item in items[1:])
    if len(items) > 1 and is_named(items[0]) and not has_later_relation:
        items[0] = items[0][3]  # x = 3, 4: the name stands for all
    return items


def choose_sign(node, sign: int):
    """Take the upper (1) or the lower (-1) sign of every plus-minus in a tree."""
    if not isinstance(node, tuple) or not node:
        return node
    if node[0] != "pm":
        return tuple(choose_sign(part, sign) for part in node)
    _, first, second, upper_sign = node
    term = choose_sign(second, sign)
    if upper_sign * sign < 0:
        term = negative(term)
    return term if first is None else ("sum", choose_sign(first, sign), term)


def same_in_order(items_a: Sequence[tuple], items_b: Sequence[tuple]) -> bool:
    """Return whether two sequences are as long, and each item is the same as the other's."""
    if len(items_a) != len(items_b):
        return False
    return all(same(a, b) for a, b in zip(items_a, items_b, strict=True))


def same_in_any_order(
    items_a: Sequence[tuple], items_b: Sequence[tuple], strict: bool = False
) -> bool:
    """Return whether each of some items has a partner among as many others."""
    rest = list(items_b)
    for item in items_a:
        partner = find_same(item, rest, strict)
        if partner is None:
            return False
        rest.pop(partner)
    return True


def find_same(item: tuple, others: Sequence[tuple], strict: bool) -> int | None:
    """Return the place of the first of the others that is the same, None if there is none."""
    for i, other in enumerate(others):
        if same(item, other, strict):
            return i
    return None


# ---- Values
def same_value(a: tuple, b: tuple) -> bool:
    """Compare expressions by their values, with letters at several points."""
    tolerance = tolerance_for(a, b)
    if not letters_of(a) and not letters_of(b):
        return same_number(evaluate(a, 0), evaluate(b, 0), tolerance)
    points, n_wanted = points_to_compare(a, b)
    golds = []
    error = UnreadableError("no value")
    for point in points:
        if not are_roots_real(point, a, b):
            continue
        try:
            gold = evaluate(a, point)
            value = evaluate(b, point)
        except TooLargeError:
            raise
        except UnreadableError as caught:  # a division by zero there
            error = caught
            continue
        if not same_number(gold, value, tolerance):
            return False
        golds.append(gold)
        if len(golds) == n_wanted:
            break
    is_zero_everywhere = all(gold == 0 for gold in golds)  # what was misread
    if len(golds) < 2 or is_zero_everywhere:
        raise error
    return True


def points_to_compare(a: tuple, b: tuple) -> tuple[range, int]:
    """Return points, and at how many of them two expressions with letters are compared."""
    if any(calls(node, "floor", "ceil", "min", "max") for node in (a, b)):
        return range(10, 50), 40  # steps show only where values are many and wide apart
    if depends_on_signs(a) or depends_on_signs(b):
        return range(10), 5  # every other one has negative letters
    return range(0, 10, 2), 3


def depends_on_signs(node: tuple) -> bool:
    """Return whether the signs of letters may matter beyond what positive letters show."""
    return calls(node, "abs") or any_part(node, is_even_root)


def is_even_root(node: tuple) -> bool:
    """Return whether a node is an even root of something with letters: sqrt(x), x^{3/4}."""
    if node[0] != "power" or not letters_of(node[1]) or letters_of(node[2]):
        return False
    try:
        exponent = evaluate(node[2], 0)
    except UnreadableError:
        return False
    return is_exact(exponent) and exponent.denominator % 2 == 0


def are_roots_real(point: int, *nodes: tuple) -> bool:
    """Return whether expressions can be compared at a point; letters are negative at odd ones.

    There, even roots must be real: sqrt(x^2) is not x, but sqrt(xy) is sqrt(x) sqrt(y).
    """

    def has_no_real_value(node: tuple) -> bool:
        if not is_even_root(node):
            return False
        base = to_complex(evaluate(node[1], point))
        return base.imag != 0 or base.real < 0

    if point >= N_NARROW_POINTS or point % 2 == 0:
        return True
    try:
        return not any(any_part(node, has_no_real_value) for node in nodes)
    except TooLargeError:
        raise
    except UnreadableError:  # a division by zero there
        return False


class Tolerance(NamedTuple):
    """How far apart, as a ratio, two answers that contain decimals may be."""

    to_fraction: Fraction  # of a gold that is a fraction
    to_irrational: Fraction  # of a gold that is a root or the like


def tolerance_for(gold: tuple, prediction: tuple) -> Tolerance:
    """Return the tolerance for a prediction: none unless an answer has decimals.

    Where the gold has none, and is a root or the like, a decimal must have seven significant
    digits, rounded or cut off: 1.414214 and 1.414213 are the root of 2, 1.41421 and 1.414215 are
    not.
    """
    if has_decimal(gold):
        return Tolerance(TOLERANCE, TOLERANCE)
    places = last_places(prediction)
    if not places:
        return Tolerance(EXACT, EXACT)
    finest = min(places)
    has_enough_digits = finest <= TOLERANCE
    return Tolerance(TOLERANCE, finest if has_enough_digits else EXACT)


def same_number(gold: Value, value: Value, tolerance: Tolerance) -> bool:
    """Compare two values within a tolerance.

    Integers are meant exactly, and so are golds of at most four decimal places, unless the other
    value is a root or the like.
    """
    is_short = is_exact(gold) and 10**4 % gold.denominator == 0 and terminates(value)
    is_integer = is_exact(gold) and gold.denominator == 1
    is_meant_exactly = is_integer or is_short
    if is_meant_exactly:
        return are_close(gold, value, EXACT)
    if is_exact(gold):
        return are_close(gold, value, tolerance.to_fraction)
    return are_close(gold, value, tolerance.to_irrational)


def terminates(value: Value) -> bool:
    """Return whether a value is a decimal of at most thirty places."""
    return is_exact(value) and 10**30 % value.denominator == 0


# ---- Relations
EQUALITIES = ("=", "~")
NAMELESS = ("symbol", "")  # the left side of "> 5"
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}  # other operators read the same both ways


def equates(relation: tuple) -> bool:
    """Return whether a relation has no other operators than equals signs, exact or approximate."""
    return all(operator in EQUALITIES for operator in relation[1])


def is_named(node: tuple) -> bool:
    """Return whether a relation only names a value: x = 5, f(x) = 2x, AB = 5, (x, y) = (1, 2)."""
    if node[0] != "relation" or not equates(node):
        return False
    left = node[2]
    if left[0] == "text":
        return True
    has_letters = letters_of(left) or left in (("symbol", "i"), ("symbol", "e"))
    return bool(has_letters) and not contains(left, "number", "sum")


def value_of(relation: tuple) -> tuple:
    """Return the value that a chain of equalities ends in.

    Raises:
        UnreadableError: It has other operators, or its sides, but for a name, are not all equal.
    """
    if not equates(relation):
        raise UnreadableError("no value")
    n_names = 1 if is_named(relation) else 0
    sides = relation[2 + n_names :]
    operators = relation[1][n_names:]
    for (left, right), operator in zip(pairwise(sides), operators, strict=True):
        if same(left, right):
            continue
        if operator != "~" or not are_nearly_equal(left, right):
            raise UnreadableError("a chain of different values")
    return sides[-1]


def are_nearly_equal(a: tuple, b: tuple) -> bool:
    return are_close(evaluate(a, 0), evaluate(b, 0), NEARLY)


def same_where_related(a: tuple, b: tuple, strict: bool) -> bool:
    """Compare where at least one side is a relation."""
    if a[0] == b[0]:
        return same_relations(a, b, strict)
    relation, other = (a, b) if a[0] == "relation" else (b, a)
    if not equates(relation):
        return describes(relation, other)
    if not is_named(relation) and letters_of(relation) - letters_of(other):
        relation = flip(relation)  # 5 = x
        if not is_named(relation):
            return False
    try:
        values = [value_of(relation)]
    except UnreadableError:
        return False
    if is_named(relation) and "~" in relation[1]:
        values.append(relation[3])  # x = \pi \approx 3.14 gives both
    if a is other:
        return any(same(other, value) for value in values)
    return any(same(value, other) for value in values)


def same_relations(a: tuple, b: tuple, strict: bool) -> bool:
    """Compare two relations: the values that they name, or what they say of their letters."""
    if is_named(a) and is_named(b):
        may_names_differ = not strict and not share_unknowns(a, b)
        if same(a[2], b[2]) or may_names_differ:
            return same(value_of(a), value_of(b))
    a = name_unknown(a, b)
    b = name_unknown(b, a)
    return len(a) == len(b) and (same_sides(a, b) or same_sides(a, flip(b)))


def name_unknown(relation: tuple, other: tuple) -> tuple:
    """Give the side that `> 5` leaves out the letter that stands alone in another relation."""
    if relation[2] != NAMELESS:
        return relation
    letters = [side for side in other[2:] if side[0] == "symbol"]
    if len(letters) != 1:
        return relation
    return (*relation[:2], letters[0], *relation[3:])


def share_unknowns(a: tuple, b: tuple) -> bool:
    """Return whether a letter that one relation names is in the other: x = 2y is not y = 2x."""
    names_a = letters_of(a[2])
    names_b = letters_of(b[2])
    if names_a & names_b or names_a & letters_of(b[-1]):
        return True
    return bool(names_b & letters_of(a[-1]))


def flip(relation: tuple) -> tuple:
    """Write a relation from right to left."""
    operators = tuple(FLIPPED.get(operator, operator) for operator in reversed(relation[1]))
    return ("relation", operators, *reversed(relation[2:]))


def same_sides(a: tuple, b: tuple) -> bool:
    """Compare relations side by side, and if that fails after moving all terms to the left."""
    if a[1] != b[1]:
        return False
    if same_in_order(a[2:], b[2:]):
        return True
    is_single = len(a) == 4 and a[1] != ("~",)
    valueless = ("group", "text", "infinity", "matrix", "list")
    if not is_single or contains(a, *valueless) or contains(b, *valueless):
        return False
    return are_proportional(a, b)


def are_proportional(a: tuple, b: tuple) -> bool:
    """Return whether left minus right of one relation is a constant times that of the other.

    For an inequality the constant must be positive.
    """
    points = range(5) if depends_on_signs(a) or depends_on_signs(b) else (0, 2, 4)
    ratios = []
    for point in points:
        if not are_roots_real(point, a, b):
            continue
        difference_a = evaluate(("sum", a[2], negative(a[3])), point)
        difference_b = evaluate(("sum", b[2], negative(b[3])), point)
        if difference_a == 0 or difference_b == 0:
            return False
        ratios.append(combine(difference_a, difference_b, truediv))
    may_be_negative = a[1] in (("=",), ("!=",))
    if not may_be_negative and to_complex(ratios[0]).real <= 0:
        return False
    return all(are_close(ratios[0], ratio, EXACT) for ratio in ratios[1:])


# ---- Intervals
def describes(relation: tuple, other: tuple) -> bool:
    """Return whether an inequality describes an interval; (1, 2), perhaps a point, is none."""
    interval = interval_of(relation)
    is_tuple = other[0] == "group" and other[1:3] == ("(", ")")
    may_be_point = is_tuple and not contains(other, "infinity")
    return interval is not None and not may_be_point and same(interval, other)


def interval_of(relation: tuple) -> tuple | None:
    """Return the interval that 1 < x <= 2 or x > 3 describes, None for another relation."""
    if relation[1][0] in (">", ">="):
        relation = flip(relation)
    operators = relation[1]
    sides = relation[2:]
    if any(operator not in ("<", "<=") for operator in operators):
        return None
    if len(sides) == 3 and sides[1][0] == "symbol":
        opening = "[" if operators[0] == "<=" else "("
        closing = "]" if operators[1] == "<=" else ")"
        return ("group", opening, closing, sides[0], sides[2])
    if len(sides) != 2:
        return None
    left, right = sides
    is_closed = operators[0] == "<="
    if left[0] == "symbol":
        return ("group", "(", "]" if is_closed else ")", negative(("infinity",)), right)
    if right[0] == "symbol":
        return ("group", "[" if is_closed else "(", ")", left, ("infinity",))
    return None
