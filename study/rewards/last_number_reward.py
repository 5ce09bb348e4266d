"""A reward for problems whose answer is a number: 1 if the last number of a response is the answer.

    python train_rl.py … --reward study/rewards/last_number_reward.py

Small models write no box, unless they are taught to; this reward asks for none.
"""

import re
from decimal import Decimal

NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text, such as -3, 1,250 or 0.5; None if there is none."""
    numbers = NUMBER.findall(text)
    if not numbers:
        return None
    return Decimal(numbers[-1].replace(",", ""))


def reward(problem: str, response: str, answer: str) -> float:
    """Return 1 for a response whose last number is the answer, else 0."""
    found = last_number(response)
    return float(found is not None and found == Decimal(answer))
