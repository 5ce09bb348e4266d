"""What a process takes from its machine: cores, grading processes, a GPU or else an error."""

import os
from pathlib import Path

import pytest
import torch

import train_rl
from grading import Pool
from infra import cores, parallel
from rewards import Grader

GROUP = "0::/slice/job\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 192 cores, to whose control groups a test gives limits."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(192)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 192)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(cores, "OWN_CGROUP", tmp_path / "own")

    def limit(own: str, limits: dict[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        for group, text in limits.items():
            folder = tmp_path / "groups" / group
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "cpu.max").write_text(text)

    return limit


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/\n", {}, 192),  # no group is limited
        ("0::/\n", {".": "1600000 100000\n"}, 16),  # a container sees its own group as the root
        ("0::/\n", {".": "max 100000\n"}, 192),
        (GROUP, {"slice/job": "250000 100000\n"}, 2),  # two and a half
        (GROUP, {"slice": "400000 100000\n", "slice/job": "max 100000\n"}, 4),
        (GROUP, {"slice": "400000 100000\n", "slice/job": "3200000 100000\n"}, 4),
        (GROUP, {"slice/job": "50000 100000\n"}, 1),  # half a core
        (GROUP, {"slice/other": "100000 100000\n"}, 192),
        ("0::/../../other\n", {".": "800000 100000\n"}, 8),
        ("4:memory:/x\n1:cpu:/\n", {".": "100000 100000\n"}, 192),  # groups of version 1
    ],
)
def test_cores_are_those_that_the_control_groups_grant(machine, own, limits, expected):
    machine(own, limits)
    assert cores.usable_cores() == expected


def test_without_control_groups_the_binding_counts(machine, monkeypatch):
    assert not cores.OWN_CGROUP.exists()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert cores.usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert cores.usable_cores() == 192


def test_ranks_share_the_cores_of_their_own_node(machine, monkeypatch):
    """Regression: two nodes of eight ranks used half of each node's cores."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda *_: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cores.cores_of_rank() == 24
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "500")
    assert cores.cores_of_rank() == 1


def test_a_rank_has_eight_grading_processes_unless_more_are_asked_for(machine, monkeypatch):
    for n_workers, expected in ((None, 8), (12, 12)):
        with Grader(["binary"], n_workers=n_workers) as grader:
            assert len(grader.pool.workers) == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    with Pool() as pool:
        assert len(pool.workers) == 3


def test_training_takes_no_more_grading_processes(machine, config, monkeypatch):
    """Regression: the scripts gave the pool as many as the node has cores."""

    class Made(Exception):
        pass

    def make(*arguments):
        with Grader(*arguments) as grader:
            raise Made(len(grader.pool.workers))

    monkeypatch.setattr(train_rl, "Grader", make)
    with pytest.raises(Made, match="^8$"):
        train_rl.main(config)


@pytest.fixture
def driver(monkeypatch):
    """An NVIDIA driver that this torch, built for CUDA, cannot use."""
    exists = Path.exists
    read_text = Path.read_text
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    files = {"/dev/nvidiactl": "", "/sys/module/nvidia/version": "535.104.05\n"}
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in files or exists(path))
    monkeypatch.setattr(Path, "read_text", lambda path: files.get(str(path)) or read_text(path))
    return files


@pytest.fixture
def no_group(monkeypatch):
    """Let start() begin anew, and fail if it goes as far as making a process group."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)

    def init_process_group(*_, **__):
        raise RuntimeError("the process group is made")

    monkeypatch.setattr("torch.distributed.init_process_group", init_process_group)


def test_a_driver_that_torch_cannot_use_is_an_error(driver, no_group, monkeypatch):
    """Regression: the run went to the CPU without a word."""
    assert parallel.find_device().type == "cpu", "importing, as --help does, needs no GPU"
    with pytest.raises(ValueError, match=r"CUDA 13.0, cannot use the NVIDIA driver 535.104.05"):
        parallel.start()
    del driver["/sys/module/nvidia/version"]
    with pytest.raises(ValueError, match="NVIDIA driver of unknown version"):
        parallel.start()


@pytest.mark.parametrize("reason", ["asked for", "asked for by -1", "no driver", "torch for CPUs"])
def test_a_run_on_the_cpu_is_none(driver, no_group, monkeypatch, reason):
    if reason == "no driver":
        del driver["/dev/nvidiactl"]
    elif reason == "torch for CPUs":
        monkeypatch.setattr(torch.version, "cuda", None)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1" if "-1" in reason else "")
    with pytest.raises(RuntimeError, match="the process group is made"):
        parallel.start()


def test_a_rank_that_does_not_see_its_gpu(no_group, monkeypatch):
    monkeypatch.setattr(parallel, "DEVICE", torch.device("cuda", 3))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="LOCAL_RANK is 3, but this process sees 1 GPUs: let all"):
        parallel.start()
