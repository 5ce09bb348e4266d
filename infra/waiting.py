"""How OpenMP's threads wait for each other: import this before torch.

    import infra.waiting  # noqa: F401

torch shares the work of an operation among threads, which wait for each other at its end. libgomp
lets them spin there, 300,000 times or more, before they sleep. That is fast while each thread has a
core. As soon as another program wants one of the cores, the threads spin in turns, and a step takes
many times as long. After few spins they sleep, and the other program gets the core.

libgomp reads the variable when it is loaded, which is when torch is imported: each script imports
this module first. Processes that it starts inherit the variable. A setting of the user's stays.

`python benchmarks/busy.py` measures a step under several policies, idle and beside busy programs;
benchmarks/RESULTS.md has the figures.
"""

import os

VARIABLE = "GOMP_SPINCOUNT"
SPINS = "1000"  # as libgomp itself spins where there are more threads than cores
SETTINGS = (VARIABLE, "OMP_WAIT_POLICY", "KMP_BLOCKTIME")  # of libgomp, both, and Intel's


def choose(environment: dict[str, str] | os._Environ) -> dict[str, str]:
    """Write the number of spins into an environment that has no setting; return what is new."""
    if any(name in environment for name in SETTINGS):
        return {}
    environment[VARIABLE] = SPINS
    return {VARIABLE: SPINS}


CHOSEN = choose(os.environ)  # empty where the user has chosen
