"""How many cores a process may use: what it is bound to, and what its control groups grant it.

On a cluster or in a container that is often far less than the machine has.
"""

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")  # where control groups (version 2) are mounted
OWN_CGROUP = Path("/proc/self/cgroup")


def cores_of_rank() -> int:
    """Return this rank's share of the cores of its node, at least 1."""
    ranks_of_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, usable_cores() // ranks_of_node)


def usable_cores() -> int:
    """Return how many cores this process and its children may use, at least 1."""
    return max(1, int(min([bound_cores(), *granted_cores()])))


def bound_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def granted_cores() -> list[float]:
    """Return the cores' worth of time that each control group of this process grants, if limited.

    A group's limit holds for the groups within it, too.
    """
    grants = []
    for folder in own_cgroups():
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except OSError:  # the root of a machine has no limit, and cpu may be no controller here
            continue
        if quota != "max":
            grants.append(int(quota) / int(period))
    return grants


def own_cgroups() -> list[Path]:
    """Return the folders of this process's control groups of version 2, the outermost first."""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:  # not on Linux
        return []
    names = [line.removeprefix("0::") for line in lines if line.startswith("0::")]
    if not names:  # there are groups of version 1 alone
        return []
    folders = [CGROUPS]
    for part in Path(names[0]).parts[1:]:
        if part == "..":  # the group is outside what a container sees
            return [CGROUPS]
        folders.append(folders[-1] / part)
    return folders
