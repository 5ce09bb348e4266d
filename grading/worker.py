"""The process that compares answers, `python -m grading.worker`: hostile text harms nothing else.

pool.py starts it, talks to it a line at a time, and kills it when an answer takes too long:

    pool      ["1/2", "0.5"]     a gold and a prediction, as JSON
    worker    ready              once, after the start
              1 or 0             the same, or not
              memory             the comparison ran out of memory
              loading, loaded    around the import of math-verify: it takes seconds, and they are
                                 not the answer's fault
"""

import json
import os
import resource
import signal
import sys

from grading.answers import equal
from grading.latex import spell

MEMORY_LIMIT = 2**30  # bytes of address space
LIFE_AFTER_PARENT = 600  # seconds that one comparison may take when no parent is left to end it
FORBIDDEN_EVENTS = (  # beginnings of the names of Python's audit events
    "socket.",
    "subprocess.",
    "shutil.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.remove",
    "os.rename",
)
WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def refuse_harm(event: str, arguments: tuple) -> None:
    """Raise PermissionError for an audit event by which a process acts on what is outside it."""
    is_forbidden = event.startswith(FORBIDDEN_EVENTS)
    if event == "open":
        _, mode, flags = arguments
        is_forbidden = bool(set(mode or "") & set("wax+") or flags & WRITING_FLAGS)
    if is_forbidden:
        raise PermissionError(f"a grading process may not {event} {arguments[:1]}")


def confine(memory: int) -> None:
    """Bound the memory (bytes) of this process, and let it read files and nothing more."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    sys.dont_write_bytecode = True
    sys.addaudithook(refuse_harm)


def import_math_verify() -> None:
    """Import math-verify when it is first needed, and tell the parent not to count the time."""
    if "math_verify" in sys.modules:
        return
    print("loading", flush=True)
    import math_verify  # noqa: F401

    print("loaded", flush=True)


def equal_by_math_verify(gold: str, prediction: str) -> bool:
    """Compare with math-verify as LaTeX; it would evaluate plain expressions as Python."""
    from math_verify import LatexExtractionConfig, parse, verify

    def parse_latex(text: str) -> list:
        latex = LatexExtractionConfig()
        return parse(f"${spell(text)}$", extraction_config=[latex], parsing_timeout=None)

    try:
        gold_readings = parse_latex(gold)
        prediction_readings = parse_latex(prediction)
        if not gold_readings or not prediction_readings:
            return False
        return bool(verify(gold_readings, prediction_readings, timeout_seconds=None))
    except Exception:  # whatever a parser makes of hostile text, the answer is not verified
        return False


def decide(gold: str, prediction: str) -> bool:
    """Compare two answers, with math-verify where the reader of answers.py cannot tell."""
    verdict = equal(gold, prediction)
    if verdict is not None:
        return verdict
    import_math_verify()
    return equal_by_math_verify(gold, prediction)


def serve() -> None:
    """Answer the lines on standard input until the parent goes; the parent keeps the time."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            stop, signal.SIG_IGN
        )  # sent to the whole process group: the parent heeds them
    confine(MEMORY_LIMIT)
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(LIFE_AFTER_PARENT)
        try:
            gold, prediction = json.loads(line)
            reply = "1" if decide(gold, prediction) else "0"
        except MemoryError:
            reply = "memory"
        signal.alarm(0)
        print(reply, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    serve()
