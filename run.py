"""The plan of a run before it; afterwards weights and problems for other programs, a page of curves.

    python run.py export runs/NAME [--step N]     weights of a checkpoint, for other programs
    python run.py problems runs/NAME              problems, for verl
    python run.py report runs/A [runs/B …]        a page of curves, and of settings that differ; of one
                                                  run that of its rollouts, too
    python run.py plan --on 8xH100 --model NAME   what a run would take, before it: see plan/command.py

What a run's folder holds stands in infra/runs.py.
"""

# first: torch reads what these set when it is imported
import infra.waiting  # noqa: F401
import plan.unseen

# isort: split
import sys
from dataclasses import fields
from pathlib import Path

import torch
import tyro

import flow as fl
from infra import checkpoints, errors, fingerprints, lora, parallel, runs
from infra.data import Problem, ProblemSettings, load_problems
from infra.exports import export_adapter, export_policy, write_weights
from infra.files import check_free, folder_written_whole, need_keys, read_json, read_text
from infra.models import LoadingSettings, Model, find_model
from infra.parallel import start
from infra.settings import check_each_kind, kinds_of, stored_settings, upgraded
from infra.verl import write_problems

FIELDS_OF_MODEL = ("model", *runs.FIELDS_OF_LOADING)  # settings that find_initial_model reads


# ---- python run.py export RUN
def export_checkpoint(
    run: tyro.conf.Positional[str],
    step: int | None = None,
    out: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write policy/ and flow/ of a checkpoint of any number of ranks, for other programs.

    Args:
        run: Run folder
        step: Step of the checkpoint; by default the newest
        out: Folder for policy/ and flow/; by default RUN/exports/step-N
        overwrite: Replace policy/, adapter/ and flow/ that are there
        trust_remote_code: Run code that comes with the model
    """
    start()
    folder = Path(run)
    stored = stored_settings(folder)
    checkpoint = find_checkpoint(folder, step)
    check_trust(run, stored, trust_remote_code)
    target = Path(out or folder / "exports" / checkpoint.name)
    dense_name = Path(str(stored.get("shaping", "flow"))).stem  # of a run of train_flow.py, flow
    for name in dict.fromkeys([*runs.RESULTS, dense_name]):
        check_free(target / name, overwrite)
    runs.check_checkpoint(folder, checkpoint)
    state = {}
    is_rl_run = "shaping" in stored
    if is_rl_run:
        file = folder / "config.json"
        need_keys([stored], file, [*FIELDS_OF_MODEL])
        model, policy, dtype = load_initial_policy(stored, file, trust_remote_code)
        state["policy"] = {"module": parallel.without_frozen(policy.state_dict(), policy)}
    flow = empty_flow(folder / "flow.json", checkpoint, dense_name)
    if flow:
        state[dense_name] = {"module": flow.state_dict()}
    elif kept := empty_tensors(dense_name, checkpoint):
        tensors = {name: torch.empty_like(like, device="cpu") for name, like in kept.items()}
        state[dense_name] = {"module": tensors}
    checkpoints.load(state, checkpoint)  # into the tensors of the modules
    for part in state.values():
        check_finite(part["module"], checkpoint)
    if "policy" in state:
        export_policy(policy, dtype, [model.tokenizer, model.processor], target / "policy")
        if stored.get("lora_rank"):
            export_adapter(policy, model.path, target / "adapter")
    if flow:
        fl.export_flow(flow, target / "flow")
    elif kept:
        write_weights(tensors, target / dense_name)
    print(f"the weights of {checkpoint} are in {target}")


def find_checkpoint(folder: Path, step: int | None) -> Path:
    """Return the checkpoint of a step, by default the newest; ValueError if there is none."""
    found = runs.whole_checkpoints(folder)
    steps = [runs.step_of(checkpoint) for checkpoint in found]
    if not found:
        raise ValueError(f"{folder} has no checkpoint; expected the folder of a run with one")
    if step is None:
        return found[-1]
    if step not in steps:
        raise ValueError(f"{folder} has no checkpoint of step {step}, only of {steps}")
    return found[steps.index(step)]


def check_finite(weights: dict[str, torch.Tensor], checkpoint: Path) -> None:
    """Raise FloatingPointError if a weight of a checkpoint is not finite."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(
                f"the weights {name} of {checkpoint} are not finite and are not exported; choose "
                "an older checkpoint with --step"
            )


def check_trust(run: str, stored: dict[str, object], trust_remote_code: bool) -> None:
    """Raise ValueError if the model of a run comes with code, and nobody has said to run it."""
    if stored.get("trust_remote_code") and not trust_remote_code:
        raise ValueError(
            f"{run}: its model runs code that came with it, which you may not have written; give "
            "--trust-remote-code if you trust it"
        )


def find_initial_model(stored: dict[str, object], file: Path, trust_remote_code: bool) -> Model:
    """Find the model that a run began with, by the settings of the run, which a file has."""
    from worlds import WORLDS

    of_model = {field: stored[field] for field in FIELDS_OF_MODEL}
    check_each_kind(of_model, {"model": str} | kinds_of(LoadingSettings()), file)
    name = stored["model"]
    if name in WORLDS:
        name = WORLDS[name].path("model")
    values = {field: stored[field] for field in runs.FIELDS_OF_LOADING}
    return find_model(name, LoadingSettings(**values, trust_remote_code=trust_remote_code))


def load_initial_policy(stored: dict[str, object], file: Path, trust_remote_code: bool) -> tuple:
    """Return the model, the policy and the compute dtype that an RL run began with.

    stored: the settings of the run, which the file has
    """
    from policy import load_policy

    model = find_initial_model(stored, file, trust_remote_code)
    dtype = parallel.compute_dtype(stored["dtype"])
    freeze = stored.get("freeze", "none")
    policy = load_policy(model.path, trust_remote_code, freeze=freeze)
    rank = stored.get("lora_rank", 0)
    alpha = stored.get("lora_alpha")
    if rank and alpha not in (None, 2 * rank):
        raise ValueError(
            f"that run has lora_alpha={alpha}, where this version has twice the rank: export with the "
            "version that began the run"
        )
    if rank:
        lora.add_adapters(policy.model, policy.layers, rank, stored["seed"])
    parallel.set_dtypes(policy, dtype)
    return model, policy, dtype


def empty_flow(file: Path, checkpoint: Path, part: str) -> fl.Flow | None:
    """Return the flow that a run's flow.json describes and a checkpoint holds; None if it has none.

    part: name of the dense reward, under which the checkpoint holds it

    ValueError if the file is of another flow: nothing is allocated before that is known.
    """
    tensors = empty_tensors(part, checkpoint)
    if not tensors or (part != "flow" and not file.exists()):
        return None
    config = fl.read_config(file, read_text(file, "the settings of a flow"))
    fl.check_tensors(file, config, {name: tensor.shape for name, tensor in tensors.items()})
    return fl.Flow(config)


def empty_tensors(part: str, checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return tensors like those that a checkpoint holds of a part's module, without memory."""
    prefix = f"{part}.module."
    tensors = {}
    for name, entry in checkpoints.read_metadata(checkpoint).state_dict_metadata.items():
        if name.startswith(prefix):
            dtype = entry.properties.dtype
            tensors[name.removeprefix(prefix)] = torch.empty(entry.size, dtype=dtype, device="meta")
    return tensors


# ---- python run.py problems RUN
def export_problems(
    run: tyro.conf.Positional[str],
    out: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write a run's problems as verl reads them: train.parquet, and eval-SET.parquet for each set.

    Args:
        run: Run folder
        out: Folder for the files; by default RUN/exports/verl
        overwrite: Replace that folder if it is there
        trust_remote_code: Run code that comes with the model
    """
    start()
    target = Path(out or Path(run) / "exports" / "verl")
    check_free(target, overwrite)
    stored = upgraded(stored_settings(run), f"{run}: that run")
    check_trust(run, stored, trust_remote_code)
    model, problems, held_out = load_problems_of(run, stored, trust_remote_code)
    template = stored["template"]
    with folder_written_whole(target, overwrite) as temporary:
        temporary.mkdir()
        source = str(stored["data"])
        write_problems(problems, source, "train", model, template, temporary / "train.parquet")
        for name, of_set in held_out.items():
            file = temporary / f"eval-{name}.parquet"
            write_problems(of_set, name, "test", model, template, file)
    print(f"{len(problems)} problems, and those of {len(held_out)} held-out sets, are in {target}")


def load_problems_of(
    run: str, stored: dict[str, object], trust_remote_code: bool
) -> tuple[Model, list[Problem], dict[str, list[Problem]]]:
    """Return the model of an RL run, the problems that it trains on, and those of each held-out set.

    ValueError if the run has none, or other ones than when it began.
    """
    from evals import load_sets

    if "shaping" not in stored or not stored.get("data"):
        raise ValueError(
            f"{run} has no data with problems and answers; expected the folder of a run of train_rl.py"
        )
    names = [field.name for field in fields(ProblemSettings)]
    file = Path(run, "config.json")
    need_keys([stored], file, [*FIELDS_OF_MODEL, *names])
    model = find_initial_model(stored, file, trust_remote_code)
    settings = ProblemSettings(**{name: stored[name] for name in names})
    problems = load_problems(stored["data"], settings, model)
    noted = Path(run, runs.DATA_FILE)
    if noted.exists():
        began_with = read_json(noted, "fingerprints of the data")
        need_keys([began_with], noted, ["training"])
        if began_with["training"] != fingerprints.of_problems(problems):
            raise ValueError(
                f"{run}: {stored['data']} has other rows than when the run began, or the same in "
                "another order; put them back"
            )
    return model, problems, load_sets(stored.get("eval_data") or (), settings, model)


# ---- python run.py report RUN [RUN …]
def report(runs: tyro.conf.Positional[tuple[str, ...]], out: str | None = None) -> None:
    """Write a page of curves of one run or several, with the settings that differ.

    In the folder of one run it leads to rollouts.html, which is written as well if there are rollouts.

    Args:
        runs: Run folders
        out: File for the page; by default report.html in the folder of one run, or beside several
    """
    from infra import record
    from pages.curves import write_run_report
    from pages.page import check_place
    from pages.rollouts import inspect_run

    if not runs:
        raise ValueError("no run; expected one run folder or several")
    if out:
        check_place(Path(out))
    paths = [Path(run) for run in runs]
    beside = paths[0] if len(paths) == 1 else paths[0].parent
    page = Path(out or beside / "report.html")
    if page.parent == paths[0] and record.find_files(paths[0]):
        inspect_run(paths[0])
    print(f"open {write_run_report(paths, page)}")


# ---- python run.py plan --on 8xH100 --model NAME
def plan_run() -> None:
    """Say what memory and time a run of train_rl.py would take of GPUs that are not there."""
    from plan.command import Config, main
    from worlds import PRESETS

    del sys.argv[1]  # it has the flags of train_rl.py, which are read as there
    runs.launch(main, Config, PRESETS["train_rl"])


if __name__ == "__main__":
    if plan.unseen.IS_ASKED_FOR:
        plan_run()
    commands = {
        "export": export_checkpoint,
        "problems": export_problems,
        "report": report,
        "plan": plan_run,
    }
    errors.run(lambda: tyro.extras.subcommand_cli_from_dict(commands))
