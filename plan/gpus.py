"""GPUs by name, and how fast they are: what was measured, what is published, what is assumed."""

import re
from typing import NamedTuple

# Of a large bfloat16 matrix product an H100 reaches 785 of its 989 TFLOP/s (benchmarks/RESULTS.md);
# the other GPUs are taken to reach the same part
REACHED = 785 / 989
# Bytes that no tensor of the trainer is: CUDA and NCCL, what the engine keeps asleep, fragments
BESIDE = 4e9  # assumed
GPUS_OF_NODE = 8  # assumed
MOST_GPUS = 1024  # that a plan takes
BETWEEN_NODES = 40e9  # bytes a second of a GPU, of 50 that a 400 Gb/s card has; assumed


class Gpu(NamedTuple):
    """A kind of GPU."""

    memory: float  # bytes
    products: float  # operations a second of a large bfloat16 matrix product
    bandwidth: float  # bytes a second of its memory (published)
    link: float  # bytes a second to the GPUs of its node, one way (published)


GPUS = {
    "A100-40": Gpu(42.3e9, REACHED * 312e12, 1.56e12, 300e9),
    "A100": Gpu(84.9e9, REACHED * 312e12, 2.04e12, 300e9),
    "H100": Gpu(85.0e9, REACHED * 989e12, 3.35e12, 450e9),
    "H200": Gpu(150e9, REACHED * 989e12, 4.8e12, 450e9),
    "B200": Gpu(191e9, REACHED * 2250e12, 8.0e12, 900e9),
}


class Machine(NamedTuple):
    """GPUs of one kind, a rank each."""

    n_gpus: int
    name: str

    @property
    def gpu(self) -> Gpu:
        """The kind of its GPUs."""
        return GPUS[self.name]

    @property
    def link(self) -> float:
        """Bytes a second that a rank gets from the others."""
        return self.gpu.link if self.n_gpus <= GPUS_OF_NODE else BETWEEN_NODES


def find_machine(text: str) -> Machine:
    """Return the machine of a text such as 8xH100; ValueError if there is none."""
    match = re.fullmatch(r"(\d+)x(.+)", text)
    if not match or match[2] not in GPUS or not 1 <= int(match[1]) <= MOST_GPUS:
        raise ValueError(
            f"--on {text}: expected a number from 1 to {MOST_GPUS:,} and a kind of GPU, such as "
            f"8xH100; the kinds are {', '.join(GPUS)}"
        )
    return Machine(int(match[1]), match[2])


# ---- Measured on one H100 (benchmarks/RESULTS.md, "One H100")
class Shares(NamedTuple):
    """Parts of the rate of a large product that scoring and update reach."""

    score: float
    update: float


# By the policy's hidden size, and whether its layers are compiled: operations over seconds, as a part of
# 785 TFLOP/s. Operations are those that a trace counts of that benchmark, with attention, and with what
# the backward makes again: 321 and 949 TFLOP of the 1.5B shape, 907 and 1,445 of 8 layers of the 7B one
MEASURED = {
    (1536, False): Shares(score=0.28, update=0.32),  # 1.45 s, 3.74 s
    (1536, True): Shares(score=0.34, update=0.39),  # 1.21 s, 3.10 s
    (3584, False): Shares(score=0.48, update=0.45),  # 2.39 s, 4.08 s
    (3584, True): Shares(score=0.50, update=0.48),  # 2.31 s, 3.86 s
}


def measured_shares(hidden_size: int, is_compiled: bool) -> Shares:
    """Return the shares of the measured size that is nearest, as a ratio."""

    def distance(size: int) -> float:
        return max(size, hidden_size) / min(size, hidden_size)

    nearest = min({size for size, _ in MEASURED}, key=distance)
    return MEASURED[nearest, is_compiled]
