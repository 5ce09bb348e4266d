"""No command takes a person's work away, and two processes do not write into one folder."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, files_of_at_most, small_run
from safetensors import SafetensorError
from test_curves import write_run

import eval as evaluation
import inspector
import train_flow
import train_rl
from infra import files, folders, runs
from infra.settings import change, flatten
from run import export_checkpoint, report
from worlds import toy
from worlds.shared import locked


@pytest.fixture
def full(tmp_path) -> Path:
    """A folder full of a person's files."""
    folder = tmp_path / "full"
    for name in ("notes.md", "policy/model.safetensors", "flow/mine.txt", "checkpoints/step-3/x"):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"the text of {name}")
    return folder


def texts_of(folder: Path) -> dict[str, str]:
    """Texts of all files of a folder, but not of its lock."""
    files_of = [p for p in folder.rglob("*") if p.is_file() and p.name != folders.LOCK]
    return {str(file.relative_to(folder)): file.read_text() for file in files_of}


# ---- Commands that would replace a folder
def train(folder: Path, world, flow: str) -> None:
    train_rl.main(small_run(world, flow, folder))


def train_a_flow(folder: Path, world, _) -> None:
    settings = {"data": world.path("expert.jsonl"), "template": "none", "max_prompt_tokens": 64}
    train_flow.main(
        change(train_flow.Config(), model=world.path("model"), folder=str(folder), **settings)
    )


def evaluate(folder: Path, world, _) -> None:
    settings = {"data": (world.path("test.jsonl"),), "template": "none", "max_tokens": 8}
    evaluation.main(
        change(evaluation.Config(), model=world.path("model"), out=str(folder), **settings)
    )


def inspect(folder: Path, world, flow: str) -> None:
    values = flatten(small_run(world, flow, folder))
    inspector.sample_and_inspect(change(inspector.Config(), **values))


def report_of_one(folder: Path, *_) -> None:
    run = write_run(folder.parent / "a-run")
    report((str(run),), out=str(folder))


def report_of_several(folder: Path, *_) -> None:
    written = [str(write_run(folder / name)) for name in ("a", "b")]
    before = texts_of(folder)
    try:
        report(tuple(written), out=str(folder))
    finally:
        assert texts_of(folder) == before, "the runs stay, too"
        shutil.rmtree(folder / "a")
        shutil.rmtree(folder / "b")


def export(folder: Path, *_) -> None:
    run = write_run(folder.parent / "a-run")
    (run / "checkpoints" / "step-3").mkdir(parents=True)
    export_checkpoint(str(run), 3, str(folder))


def make_world(folder: Path, *_) -> None:
    toy.make(toy.World(str(folder)))


COMMANDS = {
    train: "has files in it, which stay",
    train_a_flow: "has files in it, which stay",
    evaluate: "something other than an evaluation, and stays",
    inspect: "has files in it, which stay",
    report_of_one: "is a folder, which stays",
    report_of_several: "is a folder, which stays",
    export: "has files in it, which stay .*--overwrite",
    make_world: "is not an embedded world",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_full_of_files_stays(command, full, world, flow_folder):
    before = texts_of(full)
    with pytest.raises(ValueError, match=COMMANDS[command]):
        command(full, world, flow_folder)
    assert texts_of(full) == before
    assert not (full / folders.LOCK).exists()


@pytest.mark.parametrize("command", [train, evaluate, make_world])
def test_a_file_stays(command, tmp_path, world, flow_folder):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="stay"):
        command(tmp_path / "file", world, flow_folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_world_of_other_settings_stays(tmp_path):
    """It was replaced: `python -m worlds --steps 2` made a world of two steps from that of 600."""
    folder = tmp_path / "toy"
    sizes = {"hidden_size": 32, "n_layers": 1, "n_train": 4, "n_test": 2, "n_expert": 2}
    small = toy.World(str(folder), steps=1, batch_size=4, **sizes)
    folder.mkdir()
    (folder / "world.json").write_text(json.dumps(toy.settings_of(small)))
    toy.make(small)  # it is there
    with pytest.raises(ValueError, match="other settings .steps: 1, not 2.* stays as it is"):
        toy.make(change(small, steps=2))
    assert [path.name for path in folder.iterdir()] == ["world.json"]


def test_a_world_below_a_file(tmp_path):
    """The error was the system's, of a lock that nobody has asked for."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=f"could not write {tmp_path}/file/toy: .*; name another"):
        make_world(tmp_path / "file" / "toy")


def test_an_export_below_a_file_is_refused_before_the_model_loads(tmp_path):
    """It was seen when the model had been loaded, and the error was that a file exists."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=f"{tmp_path}/file is a file and cannot hold .*/policy"):
        export(tmp_path / "file")


@pytest.mark.parametrize("command", [train, train_a_flow, evaluate, report_of_one])
def test_a_name_that_is_too_long(command, tmp_path, world, flow_folder):
    with pytest.raises(OSError, match="could not write .*: File name too long; name another"):
        command(tmp_path / ("x" * 300), world, flow_folder)


def test_an_evaluation_does_not_go_on_in_a_run(tmp_path, world):
    run = write_run(tmp_path / "a-run")
    before = texts_of(run)
    with pytest.raises(ValueError, match="something other than an evaluation"):
        evaluate(run, world, None)
    assert texts_of(run) == before


def test_a_page_replaces_a_page_alone(tmp_path):
    run = write_run(tmp_path / "a-run")
    metrics = (run / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="holds something other than a page"):
        report((str(run),), out=str(run / "metrics.jsonl"))
    assert (run / "metrics.jsonl").read_text() == metrics
    for _ in range(2):
        report((str(run),), out=str(tmp_path / "page.html"))


def test_the_inspector_does_not_go_on_with_a_run(tmp_path):
    with pytest.raises(ValueError, match="samples into a folder of its own; give --model"):
        inspector.sample_and_inspect(change(inspector.Config(), resume=str(tmp_path)))


# ---- Runs without a checkpoint
def begun(folder: Path, n_steps: int, save_every: int = 20) -> train_rl.Config:
    """A run that has logged some steps and has no checkpoint; return what resumes it."""
    config = change(train_rl.Config(), folder=str(folder), save_every=save_every)
    runs.Run(config, "x").begin({})
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, n_steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "rollouts").mkdir()
    for step in range(1, n_steps + 1, 10):
        (folder / "rollouts" / f"step-{step}.jsonl").write_text("{}\n")
    return change(config, resume=str(folder))


@pytest.mark.parametrize(
    ("n_steps", "save_every", "is_over", "words"),
    [
        (100, 20, True, "100 steps in metrics.jsonl, rollouts of 10 steps, policy/"),
        (30, 20, False, "30 steps in metrics.jsonl, rollouts of 3 steps"),
        (3, 20, True, "3 steps in metrics.jsonl, rollouts of 1 steps, policy/"),
        (3, 0, False, "3 steps in metrics.jsonl"),
    ],
)
def test_a_run_whose_checkpoints_are_gone_stays(tmp_path, n_steps, save_every, is_over, words):
    folder = tmp_path / "run"
    config = begun(folder, n_steps, save_every)
    if is_over:
        (folder / "policy").mkdir()
        (folder / "policy" / "model.safetensors").write_text("weights")
    before = texts_of(folder)
    with pytest.raises(ValueError, match=f"no checkpoint to go on from.*{words}.*new run"):
        runs.Run(config, "x").begin({})
    with pytest.raises(ValueError, match="no checkpoint to go on from"):
        train_rl.resolve(config)  # before anything slow
    assert texts_of(folder) == before


@pytest.mark.parametrize(("n_steps", "unfinished"), [(0, None), (20, None), (23, "step-20")])
def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path, n_steps, unfinished):
    config = begun(tmp_path / "run", n_steps)
    if unfinished:
        (tmp_path / "run" / "checkpoints" / f"{unfinished}.writing").mkdir(parents=True)
    runs.Run(config, "x").begin({})
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


# ---- Whole or absent
def test_a_file_never_replaces_a_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is a folder, which stays"):
        files.write_json(tmp_path / "empty", {})
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def write_folder(path: Path, names: str, overwrite: bool = False) -> None:
    """Write a folder of files."""
    with files.folder_written_whole(path, overwrite) as temporary:
        temporary.mkdir()
        for name in names.split():
            (temporary / name).write_text("new")


def test_a_folder_replaces_another_only_on_request(tmp_path):
    path = tmp_path / "policy"
    path.mkdir()
    write_folder(path, "a b")  # an empty folder is nobody's work
    with pytest.raises(ValueError, match="has files in it, which stay"):
        write_folder(path, "a b c")
    assert texts_of(path) == {"a": "new", "b": "new"}
    write_folder(path, "a b c", overwrite=True)
    assert texts_of(path) == {"a": "new", "b": "new", "c": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file, which stays"):
        write_folder(tmp_path / "file", "a", overwrite=True)


def test_what_a_new_folder_lacks_is_kept(tmp_path, capsys):
    path = tmp_path / "policy"
    for kept in ("policy.before", "policy.before-2"):
        write_folder(path, "a card.md", overwrite=True)
        (path / "card.md").write_text("mine")
        write_folder(path, "a", overwrite=True)
        assert texts_of(path) == {"a": "new"}
        assert texts_of(tmp_path / kept) == {"a": "new", "card.md": "mine"}
        assert f"has card.md, too; it is kept as {tmp_path / kept}" in capsys.readouterr().out


def test_a_link_to_a_folder_is_replaced_and_the_folder_stays(tmp_path, full):
    before = texts_of(full)
    (tmp_path / "policy").symlink_to(full)
    write_folder(tmp_path / "policy", " ".join(before).replace("/", "-"), overwrite=True)
    assert texts_of(full) == before and not (tmp_path / "policy").is_symlink()


NO_ROOM = r"could not write .* \(\d+ MB free there\): .*; make room"
NO_PERMISSION = r"could not write .*: no permission \(.*\)"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), NO_ROOM),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), NO_ROOM),
        (RuntimeError("PytorchStreamWriter failed writing file"), NO_ROOM),
        (SafetensorError("I/O error: No space left on device (os error 28)"), NO_ROOM),
        (Exception("No space left on device (os error 28)"), NO_ROOM),
        (PermissionError(errno.EACCES, "Permission denied"), NO_PERMISSION),
        (OSError(errno.EROFS, "Read-only file system"), NO_PERMISSION),
        (SafetensorError("I/O error: Permission denied (os error 13)"), NO_PERMISSION),
        (OSError(errno.EIO, "Input/output error"), "could not write .*: Input/output error"),
    ],
)
def test_why_something_could_not_be_written(tmp_path, error, words):
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match=words) as caught, files.written_whole(tmp_path / "a") as new:
        new.write_text("half")
        raise error
    assert words != NO_PERMISSION or "free" not in str(caught.value)
    assert texts_of(tmp_path) == {"a": "old"}


def test_a_mistake_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(KeyError), files.written_whole(tmp_path / "a"):
        raise KeyError("x")


def test_a_world_on_a_full_disk(tmp_path):
    sizes = {"hidden_size": 32, "n_layers": 1, "n_train": 4, "n_test": 2, "n_expert": 2}
    refused = pytest.raises(OSError, match=f"could not write {tmp_path}/toy .*MB free")
    with refused, files_of_at_most(2000):
        toy.make(toy.World(str(tmp_path / "toy"), steps=1, batch_size=4, **sizes))
    assert [path.name for path in tmp_path.iterdir()] == ["toy.lock"]


# ---- Two processes in one folder
HOLD = """
import sys
from pathlib import Path
from infra import folders

folders.claim(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Start a process that claims a folder."""
    started = []

    def start(folder: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, **pipes))
        assert started[-1].stdout.readline() == "ready\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("command", [train, train_a_flow, evaluate])
def test_a_folder_in_use(command, hold, tmp_path, world, flow_folder):
    process = hold(tmp_path / "run")
    with pytest.raises(ValueError, match=f"is in use by process {process.pid} on .*; wait until"):
        command(tmp_path / "run", world, flow_folder)
    assert texts_of(tmp_path / "run") == {}


def test_a_run_that_still_runs_is_not_resumed(hold, tmp_path):
    config = begun(tmp_path / "run", n_steps=3)
    folders.release(tmp_path / "run")
    before = texts_of(tmp_path / "run")
    process = hold(tmp_path / "run")
    with pytest.raises(ValueError, match=f"is in use by process {process.pid}"):
        runs.Run(config, "x")
    assert texts_of(tmp_path / "run") == before
    process.send_signal(signal.SIGKILL)
    process.communicate()
    runs.Run(config, "x").begin({})


def test_a_second_new_run_takes_the_next_name(hold, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hold(tmp_path / "runs" / "rl-x")
    run = runs.Run(train_rl.Config(), "rl-x")
    run.begin({})
    assert str(run.folder) == "runs/rl-x-2"


def test_forked_workers_neither_have_nor_release_the_lock(tmp_path):
    code = """
import os, sys
from pathlib import Path
from infra import folders

folder = Path(sys.argv[1])
folders.claim(folder)
folders.claim(folder)  # twice is once
folders.check_unused(folder)
child = os.fork()
if child == 0:
    try:
        folders.claim(folder)
    except folders.InUseError:
        os._exit(7)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7
check = "import sys; from pathlib import Path; from infra import folders; folders.claim(Path(sys.argv[1]))"
second = f"{sys.executable} -c '{check}' {folder} 2>&1 | grep -q InUseError"
assert os.system(second) == 0
folders.release(folder)
assert os.system(second) != 0
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert done.returncode == 0


# ---- A process that stops with its parent
CHILD = """
import signal, sys, threading
from pathlib import Path
from infra import children

received = []
asked = threading.Event()
signal.signal(signal.SIGTERM, lambda number, _: (received.append(number), asked.set()))
children.follow_parent(received)
print("ready", flush=True)
while not asked.wait(0.02):
    pass
print("saved", flush=True)
"""
PARENT = """
import os, signal, sys
from pathlib import Path
from infra import children
from worlds.shared import locked

def stop(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, stop)
try:
    with locked(Path(sys.argv[2])) as lock:
        code = children.call([sys.executable, "-c", sys.argv[1]], os.environ, lock)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


@pytest.mark.parametrize(("number", "last"), [(signal.SIGTERM, "stopped"), (signal.SIGKILL, None)])
def test_a_child_saves_and_ends_with_its_parent(tmp_path, number, last):
    command = [sys.executable, "-c", PARENT, CHILD, str(tmp_path / "lock")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "ready\n"
        os.kill(parent.pid, number)
        # the pipe closes when both are gone, and the lock is free then
        assert parent.stdout.read().split() == ["saved", *([last] if last else [])]
    with locked(tmp_path / "lock"):
        pass
