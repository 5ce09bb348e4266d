"""A user's reward for the tests: it differs within groups of responses to one problem."""


def reward(problem: str, response: str) -> float:
    return float(len(response) % 3)
