"""Exercise 10, 20 minutes: read a run that fell.

`recorded/` is a part of a run of `python train_rl.py --prompts 16 --group-size 8 --lr 5e-4`: figures of
its first steps, and some responses of three steps, token by token. Look at them in three ways:

    python course/exercises/fall.py                    the figures, step by step
    python inspector.py course/exercises/recorded      a page of the responses; open the file it names
    python run.py report course/exercises/recorded     a page of curves, with links to the responses

Answer in this file, in the order of the questions; each is a step towards the last one.

Bar: all answers agree with what is recorded. The check then shows the responses with their penalties.
"""

import json
from pathlib import Path

# At which step did the share of right answers fall most, beside the step before?
STEP: int | None = None
# To one problem of that step no recorded response is right. Which? Write it as it stands on the page,
# such as "7 +5 *3 -4>".
PROBLEM: str | None = None
# Which is the first step that is wrong in most of its responses? Write it as they do, such as "3+4=7".
WRITTEN: str | None = None
# What is wrong with it: "calculation", its result, or "operation", it is not what the problem asks?
MISTAKE: str | None = None
# What outcome advantage do the responses to this problem get?
OUTCOME: float | None = None
# Which share of the step's flow reward falls on the token "="? Two digits. The page has sums by token.
SHARE: float | None = None
# Where does the flow reward penalise the responses that write the wrong step? "never at the wrong
# token", "at the wrong token alone", or "at the wrong token and at right ones"?
VERDICT: str | None = None

COLUMNS = {
    "reward": "right",
    "length": "length",
    "entropy": "entropy",
    "varied_groups": "varied",
    "flow/reward_right": "flow, right",
    "flow/reward_wrong": "flow, wrong",
    "policy/grad_norm": "gradient",
}


def print_figures() -> None:
    """Print the figures of the run, a line a step."""
    print("step", *(f"{name:>12}" for name in COLUMNS.values()))
    for line in (Path(__file__).parent / "recorded" / "metrics.jsonl").read_text().splitlines():
        figures = json.loads(line)
        print(f"{figures['step']:4}", *(f"{figures[name]:12.3f}" for name in COLUMNS))


if __name__ == "__main__":
    print_figures()
