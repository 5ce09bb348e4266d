"""The figures of a run on problems that it does not train on: before, during and after training."""

from collections.abc import Sequence

from evals import figures, sets
from infra import fingerprints, parallel
from infra.data import Problem
from infra.files import read_json
from infra.runs import DATA_FILE, Run
from rewards import Grader
from rollout import Sampling

SUMMARY_FILE = "summary.json"  # figures by `before` and `after`, then set, then kind of sampling


class HeldOut:
    """The held-out sets of a run, and their figures in its summary.json."""

    def __init__(
        self,
        problems: dict[str, list[Problem]],
        run: Run,
        grader: Grader,
        samplings: dict[str, Sampling],
    ):
        """Take the sets by name, a run that has begun, and the ways to sample by name."""
        self.problems = problems
        self.run = run
        self.grader = grader
        self.samplings = samplings
        self.summary: dict = {}

    def read_summary(self) -> None:
        """Take over the figures that a resumed run has written."""
        path = self.run.folder / SUMMARY_FILE
        if path.exists():
            self.summary = read_json(path, "the figures of a run")

    def evaluate(self, engine, names: Sequence[str]) -> dict[str, dict[str, dict]]:
        """Sample with the engine's weights; return the figures of sets by kind of sampling."""
        results: dict[str, dict[str, dict]] = {}
        with parallel.fork_rng():  # an engine may draw from the global generator
            for name in names:
                results[name] = {}
                for kind, sampling in self.samplings.items():
                    records = sets.sample(engine, name, self.problems[name], self.grader, sampling)
                    results[name][kind] = figures.summarise(records)
        return results

    def new_sets(self) -> list[str]:
        """Return the sets that have no figures before training, or had other problems then."""
        known = self.run.data.get("sets", {})
        names = []
        for name, problems in self.problems.items():
            fingerprint = fingerprints.of_problems(problems)
            is_other = name in known and known[name]["fingerprint"] != fingerprint
            if is_other or name not in self.summary.get("before", {}):
                names.append(name)
        return names

    def add_figures_before(self, engine, step: int) -> None:
        """Put the figures of new sets into the summary; note what problems and step they are of.

        A resumed run that gets a new set has no figures of it before the first step.
        """
        names = self.new_sets()
        if step and parallel.is_first():
            print(f"the figures of {', '.join(names)} before training are those after step {step}")
        self.summary.setdefault("before", {}).update(self.evaluate(engine, names))
        noted = self.run.data.setdefault("sets", {})
        for name in names:
            fingerprint = fingerprints.of_problems(self.problems[name])
            noted[name] = {"fingerprint": fingerprint, "step": step}
        self.run.write_json(DATA_FILE, self.run.data)
        self.run.write_json(SUMMARY_FILE, self.summary)

    def is_due(self, step: int, every: int) -> bool:
        """Return whether the sets are evaluated after a step; every 0: only before and after."""
        return bool(self.problems and every) and step % every == 0

    def metrics(self, engine) -> dict[str, float]:
        """Return the accuracy on every set as metrics of a step, with its interval."""
        metrics = {}
        for name, kinds in self.evaluate(engine, list(self.problems)).items():
            for kind, row in kinds.items():
                metrics[f"eval/{name}/{kind}"] = row["avg"]["mean"]
                for bound in ("low", "high"):
                    metrics[f"eval/{name}/{kind}/{bound}"] = row["avg"][bound]
        return metrics

    def add_figures_after(self, engine) -> None:
        """Put the figures of all sets after training into the summary."""
        self.summary["after"] = self.evaluate(engine, list(self.problems))
        self.run.write_json(SUMMARY_FILE, self.summary)

    def table(self) -> str:
        """Return the accuracy before and after training, a row for each set and kind of sampling."""
        rows = {}
        for name in self.problems:
            step = self.run.data.get("sets", {}).get(name, {}).get("step", 0)
            begun = f"after step {step}" if step else "before"
            for label, when in ((begun, "before"), ("after", "after")):
                for kind, row in self.summary[when][name].items():
                    rows[f"{name} {label}, {kind}"] = row
        return figures.table(rows)
