"""Exercises are graded as they should be, and what docs/exercises.md shows is what comes out."""

import math
import re
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from conftest import ROOT, copy_with_edits

from course.exercises import check

PAGE = (ROOT / "docs" / "exercises.md").read_text()
FOLDER = ROOT / "course" / "exercises"
NUMBERS = range(1, len(check.EXERCISES) + 1)
DIFFS = re.findall(r"^```diff\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
SHOWN = dict(re.findall(r"^### (\d+)\. .*?^```text\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
DEMONSTRATIONS = re.findall(
    r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE
)
# Exercise, what the solution says, what a wrong attempt says in its place, words of the hint
WRONG = [
    (1, "time * x_1 + (1 - time) * x_0", "(1 - time) * x_1 + time * x_0", "t = 1 is the latent"),
    (1, "t[:, None]", "t", "it went with the columns"),
    (1, "x_1 - x_0", "x_0 - x_1", "u points from the noise to the latent"),
    (1, ".mean(dim=-1)", ".sum(dim=-1)", "mean over the D dimensions"),
    (1, ".mean(dim=-1)", ".mean()", "one error for each row"),
    (1, "flow(x_t, t,", "flow(x_1, t,", "the flow is asked at x_t"),
    (1, "return x_t, u", "x_t", "NoneType"),
    (2, ".masked_fill(~mask, torch.inf)", "", "was taken from its padding"),
    (2, "dim=1, keepdim=True", "", "not of the whole batch"),
    (2, "mask & (spread > 0)", "mask", "0/0 is NaN"),
    (2, "largest.values", "largest.values.sign()", "the kept scores keep their values"),
    (2, "torch.where(score > threshold, score, 0.0)", "score", "among those above the threshold"),
    (2, "min(top_k, tail.shape[1])", "top_k", "topk fails where k is larger than T"),
    (3, "reversed(range(reward.shape[1]))", "range(reward.shape[1])", "over the tokens before"),
    (3, "+ gamma * following", "+ following", "gamma was not used"),
    (3, "reward[:, k] + gamma * following", "gamma * (reward[:, k] + following)", "gamma^0 = 1"),
    (
        3,
        "torch.where(mask[:, k], reward[:, k] + gamma * following, following)",
        "reward[:, k] + gamma * following",
        "mask the rewards",
    ),
    (3, "returns * mask", "returns", "a tool's token has no return"),
    (4, "reward.view(-1, group_size)", "reward.view(1, -1)", "not of the whole batch"),
    (4, "reward.view(-1, group_size)", "reward.view(group_size, -1)", "one behind the other"),
    (4, "dim=1", "dim=0", "dim=1 runs inside a group"),
    (4, "keepdim=True) + 1e-9", "keepdim=True, correction=0) + 1e-9", "std divides by G - 1"),
    (4, "torch.where(is_varied, advantage, 0.0)", "advantage", "their ratio is a rounding error"),
    (4, ".flatten()", "", "flatten() at the end"),
    (5, "-torch.minimum", "torch.minimum", "mind the sign"),
    (5, "torch.minimum", "torch.maximum", "stops the tokens that moved the wrong way"),
    (5, "-torch.minimum(unclipped, clipped)", "-clipped", "take the minimum"),
    (5, "(logp - old_logp)", "(old_logp - logp)", "rho is now over then"),
    (5, ".clamp(max=RATIO_CAP)", "", "cap the ratio"),
    (5, "clipped < unclipped", "ratio != ratio.clamp(1 - low, 1 + high)", "is not enough"),
    (5, "(logp - old_logp)", "(logp - old_logp).detach()", "may be detached"),
    (6, "ids[:, :-1][targets[:, 1:]]", "ids.roll(-1, 1)[targets]", "these are the tokens after"),
    (6, "before * n_tokens + token", "token * n_tokens + before", "the row is the token before"),
    (6, "-probability.log()", "probability.log()", "minus the log"),
    (6, "counts[before, token] + SMOOTHING", "counts[before, token]", "expected"),
    (6, "part.per_token(-self", "part.per_token(self", "higher is better"),
    (7, "torch.linalg.cholesky(spread)", "spread", "take its Cholesky factor"),
    (7, "torch.cov(steps.T)", "torch.cov(steps)", "the dimensions as rows"),
    (7, "white.square()", "(steps - mean).T.square()", "the steps were not whitened"),
    (7, "(steps - mean).T", "steps.T", "subtract the mean step first"),
    (7, "part.per_token(-self", "part.per_token(self", "higher is better"),
    (8, "repeat_interleave", "repeat", "which answers are compared"),
    (8, "N_STEPS = 61", "N_STEPS = 2000", "N_STEPS, RATE are as they were"),
    (9, "s**2 / (t**2 * s**2 + (1 - t) ** 2)", "s**2 + 1", "a flow that says 0"),
    (9, "1 / (t * (1 - t))", "1 / t**2", "this is the error"),
    (10, "STEP = 14", "STEP = 13", "the last step before the fall"),
    (10, '"1+2=3"', '"3+7=0"', "follows from what went wrong before"),
    (10, '"operation"', '"calculation"', "modulo 10 the result is right"),
    (10, "OUTCOME = 0.0", "OUTCOME = -0.0746", "in which the flow reward is"),
    (10, '"never at the wrong token"', '"at the wrong token alone"', 'another of "never'),
    (11, "0.975, n - 1", "0.95, n - 1", "2.5 % on either side"),
    (11, '"cannot tell"', '"no difference"', "does not show that there is none"),
    (11, '"helps"', '"harms"', 'another of "helps", "harms"'),
]


def grade(number: int, file: Path) -> tuple[bool, str]:
    """Grade a file in this process; return whether it is passed, and what was printed."""
    with redirect_stdout(StringIO()) as printed:
        passed = check.grade(number, file)
    return passed, printed.getvalue()


@pytest.fixture(scope="module")
def solved() -> dict[int, tuple[bool, str]]:
    """The grade of each solution, and what was printed."""
    return {number: grade(number, check.file_of(number, solution=True)) for number in NUMBERS}


# ---- Blanks, solutions, wrong attempts
@pytest.mark.parametrize("number", NUMBERS)
def test_a_blank_fails_and_says_that_it_is_blank(number):
    passed, printed = grade(number, check.file_of(number, solution=False))
    assert not passed
    *_, complaint = printed.partition("not yet: ")
    is_bug = check.EXERCISES[number - 1] == "bug"
    assert ("hint: " if is_bug else "still blank") in complaint
    assert "passed" not in printed


@pytest.mark.parametrize("number", NUMBERS)
def test_a_solution_passes(solved, number):
    passed, printed = solved[number]
    assert passed, printed
    assert printed.endswith("\npassed\n")


@pytest.mark.parametrize(("number", "right", "wrong", "hint"), WRONG)
def test_a_wrong_attempt_gets_its_hint(tmp_path, number, right, wrong, hint):
    solution = check.file_of(number, solution=True)
    text = solution.read_text()
    assert right in text
    attempt = tmp_path / solution.name
    attempt.write_text(text.replace(right, wrong))
    passed, printed = grade(number, attempt)
    assert not passed
    assert hint in printed.partition("not yet: ")[2], printed


def test_each_function_has_three_wrong_attempts():
    counts = {number: sum(attempt[0] == number for attempt in WRONG) for number in range(1, 8)}
    assert min(counts.values()) >= 3


def test_a_file_that_cannot_be_imported(tmp_path):
    attempt = tmp_path / "loss.py"
    attempt.write_text("import torch\nratio = torch.ones(2) @ torch.ones(3)\n")
    passed, printed = grade(5, attempt)
    assert not passed
    assert f"cannot be imported: {attempt}, line 2: RuntimeError: " in printed


@pytest.mark.parametrize("place", ["at its import", "in a function"])
def test_a_file_that_ends_the_process_is_not_passed(place, tmp_path):
    """The check ended with code 0, as if the exercise were passed."""
    text = check.file_of(1, solution=True).read_text()
    if place == "at its import":
        text += "raise SystemExit\n"
    else:
        text = text.replace('"""\n    ', '"""\n    raise SystemExit\n    ')
    attempt = tmp_path / "interpolate.py"
    attempt.write_text(text)
    passed, printed = grade(1, attempt)
    assert not passed and "SystemExit" in printed.partition("not yet: ")[2]


def test_the_command_of_a_blank():
    command = [sys.executable, str(FOLDER / "check.py"), "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 1
    assert "token_returns() in returns.py, line 24, is still blank" in done.stdout


def test_the_command(monkeypatch, capsys):
    """It ends quietly with a solution, lists exercises, and names a number that there is not."""
    monkeypatch.setattr(sys, "argv", ["check.py", "3", "--solution"])
    check.main()
    assert capsys.readouterr().out.endswith("passed\n")
    monkeypatch.setattr(sys, "argv", ["check.py"])
    check.main()
    assert len(capsys.readouterr().out.splitlines()) == 11
    monkeypatch.setattr(sys, "argv", ["check.py", "12"])
    with pytest.raises(ValueError, match="no exercise 12; expected 1 to 11"):
        check.main()


# ---- The page, and the folder
def test_each_exercise_has_a_check_a_solution_and_a_row_of_the_table():
    for folder in (FOLDER / "checks", FOLDER / "solutions"):
        assert {path.stem for path in folder.glob("*.py")} == set(check.EXERCISES)
    rows = re.findall(r"^\| (\d+) \| .* \| `(\w+)\.py` \| (\d+) \| .* \|$", PAGE, re.MULTILINE)
    assert [(int(number), name) for number, name, _ in rows] == list(
        enumerate(check.EXERCISES, start=1)
    )
    for number, _, minutes in rows:
        assert check.title_of(int(number)).startswith(f"Exercise {number}, {minutes} minutes: ")


def test_the_folders_page_names_each_of_its_files():
    named = re.findall(r"^\| `(\w+\.py)` \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in FOLDER.glob("*.py"))


def assert_same_text(printed: str, expected: str) -> None:
    """Assert that texts are the same, numbers to 0.1 or 5 %; pictures, lines of signs, do not count."""
    number = r"[-+]?\d+(?:\.\d+)?"

    def words(text: str) -> list[str]:
        lines = [line for line in text.splitlines() if re.search(r"[A-Za-z0-9]", line)]
        return "\n".join(lines).split()

    assert [re.sub(number, "0", w) for w in words(printed)] == [
        re.sub(number, "0", w) for w in words(expected)
    ]
    pairs = zip(re.findall(number, printed), re.findall(number, expected), strict=True)
    for got, wanted in pairs:
        assert math.isclose(float(got), float(wanted), rel_tol=0.05, abs_tol=0.1), (got, wanted)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_page_shows_what_a_check_shows(solved, number):
    _, printed = solved[number]
    shown = printed.rpartition("\nright: ")[2].partition("\n")[2].removesuffix("passed\n")
    assert_same_text(shown, SHOWN[str(number)])


# ---- Demonstrations, and the edit
def test_demonstrations_print_what_the_page_says():
    assert len(DEMONSTRATIONS) == 3
    for program, expected in DEMONSTRATIONS:
        with redirect_stdout(StringIO()) as printed:
            exec(program, {})
        assert_same_text(printed.getvalue(), expected)


def test_the_edit_stands_where_its_header_says():
    """A diff applies in other lines, too, and then misleads who types it."""
    (diff,) = DIFFS
    lines = (ROOT / re.search(r"^--- a/(.*)$", diff, re.MULTILINE)[1]).read_text().splitlines()
    hunks = re.findall(
        r"^@@ -(\d+),(\d+) .*?@@.*?\n(.*?)(?=^@@|\Z)", diff, re.DOTALL | re.MULTILINE
    )
    assert len(hunks) == 2
    for start, count, hunk in hunks:
        before = [line[1:] for line in hunk.splitlines() if not line.startswith("+")]
        first = int(start) - 1
        assert lines[first : first + int(count)] == before


EDITED = """
import torch
import rlfr
for n_right, expected in enumerate([(0, 0), (1, 0), (1, 0), (1, 0), (1, 0), (0, -1), (0, -1), (0, -1)]):
    reward = torch.tensor([0.0] * (8 - n_right) + [1.0] * n_right)
    advantage = rlfr.outcome_advantage(reward, 8, "median")
    assert (advantage[-1].item(), advantage[0].item()) == expected, n_right
"""


def test_the_edit_applies_and_does_what_the_page_says(tmp_path):
    copy = copy_with_edits(tmp_path / "edited", DIFFS, {})
    done = subprocess.run([sys.executable, "-c", EDITED], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
