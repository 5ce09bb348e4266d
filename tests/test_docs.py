"""What the documents name is there: functions, flags, metrics, sizes of flows."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, figures, small_run

import eval as evaluation
import flow as fl
import train_flow
import train_rl
from infra import errors
from infra.settings import flatten, parse_config
from plan.command import Config as PlanConfig
from worlds import toy

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "AGENTS.md",
    "docs/algorithm.md",
    "docs/development.md",
    "docs/full-runs.md",
    "docs/results.md",
    "docs/running.md",
    "docs/departures.md",
    "docs/elsewhere.md",
    "docs/seeing.md",
    "docs/exercises.md",
    "docs/turns.md",
    "docs/walkthrough.md",
    "docs/theory.md",
    "docs/glossary.md",
    "grading/README.md",
)
# Flags of torchrun, hf, rewards.py, benchmarks/, study/, course/, and of one form of inspector.py
FOREIGN_FLAGS = {
    "--out",
    "--tracked",
    "--solutions",
    "--worlds",
    "--to",
    "--inplace",
    "--overwrite",
    "--name",
    "--check",
    "--dist",
    "--no-loadscope-reorder",
    "--retries",
    "--quick",
    "--world",
    "--bases",
    "--arms",
    "--seeds",
    "--nnodes",
    "--nproc-per-node",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--rdzv-id",
    "--repo-type",
    "--help",
    "--workers",
    "--json",
    "--deadline",
    "--solution",
    "--jsonl",
    # of benchmarks/first_gpu.py
    "--list",
    "--compare",
    # of Chromium
    "--headless",
    "--hide-scrollbars",
    "--force-device-scale-factor",
    "--window-size",
    "--virtual-time-budget",
    "--screenshot",
}


def test_functions_that_the_page_of_the_algorithm_links():
    page = (ROOT / "docs" / "algorithm.md").read_text()
    links = re.findall(r"\[`(\w+)\.(?!py`)([\w.]+)`\]\(\.\./([\w/]+)\.py\)", page)
    assert len(links) >= 20
    for module, path, file in links:
        assert module == file.rpartition("/")[2]
        value = importlib.import_module(file.replace("/", "."))
        for name in path.split("."):
            value = getattr(value, name)


def test_the_readme_is_read_in_some_minutes():
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    assert len(lines) <= 120 and len(text.split()) <= 1500
    assert lines.index("```bash") < 14, "what to type comes before line 15"


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in words}


def test_links_lead_somewhere():
    pages = [page for page in ROOT.rglob("*.md") if not {"runs", ".venv"} & set(page.parts)]
    assert len(pages) >= 20
    for page in pages:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if link.startswith("http"):
                continue
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page.relative_to(ROOT)}: {link}"
            if anchor:
                assert anchor in anchors(target), f"{page.relative_to(ROOT)}: {link}"


@pytest.mark.parametrize(
    "name", ["infra", "engines", "benchmarks", "study", "plan", "worlds", "course"]
)
def test_the_page_of_a_folder_names_each_of_its_files(name):
    folder = ROOT / name
    page = (folder / "README.md").read_text()
    named = re.findall(r"^\| `([\w/]+\.py)` \|", page, re.MULTILINE)
    with_pages = [inner.parent for inner in folder.glob("*/README.md")]
    files = []
    for path in folder.rglob("*.py"):
        if path.name != "__init__.py" and not any(inner in path.parents for inner in with_pages):
            files.append(str(path.relative_to(folder)))
    assert sorted(named) == sorted(files)


OUTPUT = re.compile(
    r"(?:--json|--out|--folder|--screenshot|--inplace|-o(?= \S+\.))[= ]+([^\s`'\"\]]+)|--tracked"
)


def outputs(text: str) -> list[str]:
    """Return what the commands of a text write: a file or folder each, or a flag that names none."""
    commands = [line for line in text.splitlines() if "--render" not in line]
    return [found[1] or found[0] for found in OUTPUT.finditer("\n".join(commands))]


def test_documented_commands_leave_what_git_tracks_as_it_is():
    """They write to runs/, or to a place that the reader names; but for a table for maintainers."""
    heading = "## What the repository keeps of runs"
    pages = [page for page in ROOT.rglob("*.md") if not {"runs", ".venv"} & set(page.parts)]
    texts = {page: page.read_text() for page in pages}
    for folder in ("study", "benchmarks", "course", "worlds"):
        for file in (ROOT / folder).rglob("*.py"):
            docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
            # a program's own flag for what is kept has its line there
            texts[file] = docstring.replace("--tracked", "")
    development = ROOT / "docs" / "development.md"
    texts[development], _, kept = texts[development].partition(heading)
    assert len(outputs(kept)) >= 8
    written = 0
    for path, text in texts.items():
        for target in outputs(text):
            is_named_by_the_reader = re.fullmatch(r"[A-Z_]+(\.\w+)?[,.;]?|…|and|names", target)
            assert target.split("/")[0] == "runs" or is_named_by_the_reader, f"{path}: {target}"
            written += 1
    assert written >= 30
    assert outputs("--json study/signal.json") == ["study/signal.json"]
    assert outputs("python study/evidence.py --tracked") == ["--tracked"]


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_a_page_names(page):
    text = (ROOT / page).read_text()
    known = {errors.FLAG, "--config", *FOREIGN_FLAGS}
    # a plan has the flags of train_rl.py, too
    for config in (PlanConfig(), train_flow.Config(), evaluation.Config()):
        known |= {f"--{name.replace('_', '-')}" for name in flatten(config)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text))
    assert named <= known, named - known


def test_metrics_that_the_page_on_running_names(world, flow_folder, tmp_path):
    """Each figure of a step has its name in the table of docs/running.md."""
    table = (ROOT / "docs" / "running.md").read_text().partition("## Metrics")[2]
    names = set()
    for cell in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE):
        previous = ""
        for name in re.findall(r"`(.+?)`", cell):
            if name.startswith("/"):  # `grader/timeout`, `/crashed`
                name = previous.rpartition("/")[0] + name
            names.add(name)
            previous = name
    patterns = {name.replace("PART", "*").replace("SET", "*").replace("*", ".+") for name in names}
    settings = {
        "eval_data": (world.path("test.jsonl"),),
        "prompts": 2,
        "max_tokens": 8,
        "steps": 1,
        "eval_every": 1,
        "kl_coef": 0.1,
        "kl_in": "reward",
        "entropy_coef": 0.01,
    }
    found = set()
    for shaping in ("flow", "entropy"):
        folder = tmp_path / shaping
        train_rl.main(small_run(world, flow_folder, folder, shaping=shaping, **settings))
        found |= figures(folder)[0].keys()
    found -= {"step"}
    for name in found:
        assert any(re.fullmatch(pattern, name) for pattern in patterns), name
    # on a GPU; figures() drops times; there may be no right episode
    elsewhere = {"memory/score_gb", "memory/update_gb", "memory/roll_out_gb", "time/.+"}
    elsewhere |= {"flow/score_right", "flow/reward_right"}
    for pattern in patterns - elsewhere:
        assert any(re.fullmatch(pattern, name) for name in found), pattern


@pytest.mark.parametrize(("dim", "n_blocks"), [(1536, 4), (3584, 6), (4096, 6)])
def test_sizes_of_flows_in_the_table_of_memory(dim, n_blocks):
    with torch.device("meta"):
        flow = fl.Flow(fl.FlowConfig(dim, n_blocks))
    millions = sum(parameter.numel() for parameter in flow.parameters()) / 1e6
    assert f"| {millions:.0f} M parameters |" in (ROOT / "docs" / "running.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "The defaults shown are those of the embedded world --model toy; --help with"),
        (["--model", "Qwen2.5-Math-7B"], "The defaults shown are those of --model Qwen2.5-Math-7B"),
    ],
)
def test_the_help_says_whose_defaults_it_shows(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["train_rl.py", *arguments, "--help"])
    with pytest.raises(SystemExit):
        parse_config(train_rl.Config, toy.PRESETS["train_rl"])
    shown = " ".join(re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert words in shown
    assert "--config FILE takes settings from a JSON or YAML file" in shown
    assert "Larger images are reduced to this size; None: the processor's" in shown
    assert "by default binary, for VL models vlm tags=0.5" in shown


def test_the_page_of_departures_names_the_flags_that_undo_them():
    page = (ROOT / "docs" / "departures.md").read_text()
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", page))
    assert {"--contexts", "--flow-times", "--flow-lr"} <= named
    assert {"--flow-bilateral", "--flow-top-k", "--reward", "--mismatch", "--kl-in"} <= named
    differences = page.split("## Other differences")[1]
    first, second = re.findall(r"\| `(--[a-z-]+ \w+)` \|\n", differences)[:2]
    assert (first, second) == ("--mismatch none", "--stop-tokens eos"), "those that weigh most"
