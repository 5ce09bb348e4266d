"""A reward for the tests that differs within some groups: those of problems with an odd start."""


def reward(problem: str, response: str) -> float:
    if int(problem[0]) % 2 == 0:
        return 0.0
    return float(len(response) % 3)
