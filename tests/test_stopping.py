"""The first signal outside of a step ends a command at once and well, and what was whole goes on."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from conftest import BY_LENGTH, figures, flags, small_run
from test_distributed import check_exit, start

import eval as evaluation
import train_flow
import train_rl
from evals.held_out import HeldOut
from infra import runs
from infra.runs import Stop
from infra.settings import change
from worlds import toy

# A reward whose first call sends a signal to the process that grades; threads call it
SIGNALS_ITSELF = """
import os, signal

def reward(problem, response):
    try:
        open({mark!r}, "x").close()
        os.kill(os.getpid(), signal.SIGTERM)
    except FileExistsError:
        pass
    return float(len(response) % 3)
"""


@pytest.fixture
def heeding(monkeypatch):
    """Signals do in this process what they do after runs.listen()."""
    monkeypatch.setattr(runs, "received", [])
    monkeypatch.setattr(runs, "unit", None)
    before = signal.signal(signal.SIGTERM, runs.heed)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def signalling(tmp_path) -> tuple[str]:
    """Settings of a run whose first graded response brings a signal."""
    reward = tmp_path / "reward.py"
    reward.write_text(SIGNALS_ITSELF.format(mark=str(tmp_path / "mark")))
    return (str(reward),)


def send_when(condition) -> threading.Thread:
    """Send SIGTERM to this process as soon as a condition holds."""

    def wait():
        while not condition():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_world_that_is_being_made(tmp_path, heeding, capfd):
    """It went on for minutes, and said that it finished a step."""
    world = toy.World(str(tmp_path / "toy"), steps=10**6, batch_size=8, hidden_size=32, n_layers=1)
    begun = tmp_path / "toy.lock"
    send_when(begun.exists)
    with pytest.raises(Stop):
        toy.make(world)
    assert "SIGTERM: stopping here, no step is in progress" in capfd.readouterr().err
    assert not Path(world.folder).exists()
    toy.make(change(world, steps=2))
    assert (Path(world.folder) / "world.json").exists()


def test_the_evaluation_before_step_1(world, flow_folder, tmp_path, signalling):
    """In a process of its own: exit 0 and what to do next; that goes on as if nothing had been."""
    settings = {"eval_data": (world.path("test.jsonl"),), "reward": signalling, "steps": 1}
    config = small_run(world, flow_folder, tmp_path / "run", grade_truncated=True, **settings)
    output = check_exit(start("train_rl.py", flags(config), 1))
    assert "stopping here, no step is in progress" in output
    assert f"stopped; go on with --resume {config.folder}" in output
    assert "metrics.jsonl" not in output and "Traceback" not in output
    assert not (tmp_path / "run" / "summary.json").exists()
    train_rl.main(change(config, resume=config.folder))
    train_rl.main(change(config, folder=str(tmp_path / "undisturbed")))
    assert figures(config.folder) == figures(tmp_path / "undisturbed")


def test_a_signal_after_the_last_step_is_saved(world, flow_folder, tmp_path, heeding, monkeypatch):
    """The evaluation at the end is not waited for; a resumed run makes it up."""
    settings = {"eval_data": (world.path("test.jsonl"),), "save_every": 1, "steps": 1}
    config = small_run(world, flow_folder, tmp_path / "run", **settings, **BY_LENGTH)
    evaluate = HeldOut.evaluate

    def evaluate_amid_signals(*arguments):
        if (tmp_path / "run" / "policy").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(HeldOut, "evaluate", evaluate_amid_signals)
    with pytest.raises(Stop):
        train_rl.main(config)
    monkeypatch.setattr(HeldOut, "evaluate", evaluate)
    monkeypatch.setattr(runs, "received", [])
    train_rl.main(change(config, resume=config.folder))
    assert "after" in (tmp_path / "run" / "summary.json").read_text()


def test_a_signal_in_the_last_step_saves_it(world, flow_folder, tmp_path, heeding, signalling):
    """Also where a run keeps no checkpoints: what follows the step may take long."""
    settings = {"reward": signalling, "grade_truncated": True, "steps": 1, "save_every": 0}
    config = small_run(world, flow_folder, tmp_path / "run", **settings)
    train_rl.main(config)
    assert len(figures(config.folder)) == 1 and not (tmp_path / "run" / "policy").exists()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]


def test_before_the_first_step_of_the_flow(world, tmp_path, heeding, monkeypatch):
    config = change(
        train_flow.Config(), model=world.path("model"), data=world.path("expert.jsonl"),
        template="none", batch_size=10, epochs=1, flow_blocks=1, max_prompt_tokens=64,
        folder=str(tmp_path / "flow"),
    )  # fmt: skip
    measure = train_flow.Latents.keep

    def keep_amid_signals(latents):
        os.kill(os.getpid(), signal.SIGTERM)
        measure(latents)

    monkeypatch.setattr(train_flow.Latents, "keep", keep_amid_signals)
    with pytest.raises(Stop):
        train_flow.main(config)


def test_an_evaluation_finishes_its_chunk(world, tmp_path, heeding, signalling, capfd):
    config = change(
        evaluation.Config(), model=world.path("model"), data=(world.path("test.jsonl"),),
        template="none", max_tokens=8, chunk=4, reward=signalling, out=str(tmp_path / "eval"),
    )  # fmt: skip
    evaluation.main(config)
    printed = capfd.readouterr()
    assert "finishing this chunk of problems, then saving" in printed.err
    assert f"stopped; the same command goes on with {config.out}" in printed.out
    samples = tmp_path / "eval" / "samples.jsonl"
    assert len(samples.read_text().splitlines()) == 4
    runs.received.clear()
    evaluation.main(config)
    assert len(samples.read_text().splitlines()) == 16


# ---- Where Python heeds no signals
IN_C = """
import ctypes, os, signal, sys, threading, time
from infra import runs

runs.GRACE = 0.1


def wait_in_c():
    c = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)
    c.pthread_mutex_lock(mutex)
    c.pthread_mutex_lock(mutex)  # for ever, whatever signals come, as in a collective


WAITS = wait_in_c.__code__.co_firstlineno + 4


def send_amid_wait(n_signals):
    main = threading.main_thread().ident
    while sys._current_frames()[main].f_lineno != WAITS:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    while n_signals == 2:  # those that come together are one
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)


def outside_of_work():
    runs.listen()
    threading.Thread(target=send_amid_wait, args=(1,)).start()
    wait_in_c()


def twice_amid_work():
    runs.listen()
    runs.unit = "step"
    threading.Thread(target=send_amid_wait, args=(2,)).start()
    wait_in_c()


def of_a_child():
    runs.listen()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"ready")
        wait_in_c()
    os.read(reader, 5)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    time.sleep(3 * runs.GRACE)  # the parent is not ended
    os._exit(100 + os.WTERMSIG(status))


for case in (outside_of_work, twice_amid_work, of_a_child):
    process = os.fork()
    if process == 0:
        case()
    _, status = os.waitpid(process, 0)
    print(case.__name__, os.waitstatus_to_exitcode(status))
"""


def test_signals_where_the_main_thread_waits(tmp_path):
    script = tmp_path / "in_c.py"
    script.write_text(IN_C)
    lines = check_exit(start(script, [], 1)).splitlines()
    cases = ("outside_of_work", "twice_amid_work", "of_a_child")
    assert [line for line in lines if line.startswith(cases)] == [
        "outside_of_work 0",
        f"twice_amid_work {128 + signal.SIGTERM}",
        f"of_a_child {100 + signal.SIGTERM}",
    ]
    assert "stopped; the same command starts again" in lines
