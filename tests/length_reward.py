"""A user's reward for the tests: it differs inside groups."""


def reward(problem: str, response: str) -> float:
    return float(len(response) % 3)
