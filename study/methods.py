"""The arms of a study: methods, controls, rewards of files, and what their runs share.

In settings, {flow} stands for the path of what was prepared under that name. study.py gives
{base}, {problems}, {solutions}, {evaluation}, {rewards} and {n_held_out}.

A reward FILE.py of --reward, or NAME=FILE.py, is tried in arms that differ in one thing:
    FILE.py                  the reward, on the mean of a response, at the coefficient of scale.py
    FILE.py-shuffled-25      a quarter of its scores in other places, and so on to 100
    FILE.py-wrong            fitted to wrong solutions, where it is fitted to solutions (`experts`)
    FILE.py-untrained        with weights that have not learnt, where it has a flow, or `steps` of a fit
"""

import ast
import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import train_rl
from dense import DenseReward, FlowReward, as_values
from infra.files import import_file
from infra.kinds import as_tuple, describe, from_text, is_of_kind
from infra.ranges import check_values
from infra.settings import change, kinds_of
from repository import ROOT

REWARDS = ROOT / "study" / "rewards"

# ---- Arms. In settings, {flow} stands for the path of what was prepared under that name.
FLOW_EPOCHS = 4  # of the offline start; the world's own default became three times as many
LONGER = (5, 20)  # times as many, for flows of which it is asked what a longer start is worth
FLOW = {"flow": "{flow}"}
RLVR = {"shaping": "none"}
# Whoever learns from the expert solutions leaves out those that the calibration is on
EXPERTS = ("--expert-solutions", "{solutions}", "--held-out", "{n_held_out}")
SFT = ("study/sft.py", *EXPERTS)
LUFFY = ("study/luffy.py", *EXPERTS, "--expert-prompts", "2")
ENTROPY = ("study/entropy.py", "--alpha", "0.4")


@dataclass(frozen=True)
class Arm:
    """A way to train: what it asks, and its settings of train_rl.py."""

    asks: str
    file: str  # of settings, in study/arms/, which --config of train_rl.py takes as well
    prepared: dict[str, object] = field(default_factory=dict)  # settings with what was prepared
    script: tuple[str, ...] = ("train_rl.py",)  # with its first arguments
    beside: str | None = None  # the arm that it is a control or a variant of; None: a method itself

    @property
    def settings(self) -> dict[str, object]:
        """All settings of the arm, by flag name."""
        text = (ROOT / "study" / "arms" / f"{self.file}.json").read_text()
        # its files of rewards are found from any folder
        own = json.loads(text.replace("study/rewards/", "{rewards}/"))
        return {**{name: as_tuple(value) for name, value in own.items()}, **self.prepared}


ARMS = {
    "rlvr": Arm("What does the outcome alone achieve?", "rlvr"),
    "entropy": Arm("Does the entropy advantage help?", "rlvr", script=ENTROPY),
    "published": Arm("Does the flow reward help as published?", "published", FLOW),
    "calibrated": Arm(
        "Does it help as a response's excess over the flow's values on expert tokens?",
        "calibrated",
        FLOW,
    ),
    "process": Arm(
        "What would a perfect dense reward achieve? The share of right steps, the ceiling.",
        "process",
    ),
    "sft": Arm(
        "What do the expert solutions achieve as mere training data? As many solutions a step as "
        "others have episodes.",
        "rlvr",
        script=SFT,
        beside="calibrated",
    ),
    "sft-rlvr": Arm(
        "And what does the outcome achieve after that?",
        "rlvr",
        {"model": "{sft}"},
        beside="calibrated",
    ),
    "luffy": Arm(
        "What do they achieve as further episodes of their groups? As many answers a step as others "
        "have, to two problems with an expert solution among them.",
        "rlvr",
        {"prompts": 6, "train_batch": 48},
        script=LUFFY,
        beside="calibrated",
    ),
    "distillation": Arm(
        "What does an expert policy's log-prob, less the policy's own, achieve token by token?",
        "distillation",
        {"dense": ("expert={sft}",)},
        beside="calibrated",
    ),
    "noise": Arm(
        "What do random numbers achieve?",
        "noise",
        {"dense_coef": "{scale_noise}"},
        beside="calibrated",
    ),
    "default": Arm(
        "How does `python train_rl.py` go, on other base models and seeds?",
        "default",
        {"flow": "{default_flow}"},
    ),
    "published-shuffled": Arm(
        "Does it matter which tokens of a response the published scores fall on?",
        "published-shuffled",
        FLOW,
        beside="published",
    ),
    "calibrated-shuffled": Arm(
        "Does it matter which response of a group a mean excess belongs to?",
        "calibrated-shuffled",
        FLOW,
        beside="calibrated",
    ),
    "calibrated-token-shuffled": Arm(
        "Does it matter which tokens of a response an excess falls on?",
        "calibrated-token-shuffled",
        FLOW,
        beside="calibrated-token",
    ),
    "published-untrained": Arm(
        "Does the published reward need a flow that has learnt?",
        "published-frozen",
        {"flow": "{untrained_flow}"},
        beside="published",
    ),
    "untrained": Arm(
        "Does the calibrated reward need a flow that has learnt? The calibration is on the same "
        "expert tokens.",
        "calibrated",
        {"flow": "{untrained_flow}"},
        beside="calibrated",
    ),
    "hasty-flow": Arm(
        "Does it need expert solutions? The flow is fitted to wrong responses of the base model.",
        "calibrated",
        {"flow": "{hasty_flow}"},
        beside="calibrated",
    ),
    "length": Arm("Is it a reward for length?", "length", beside="calibrated"),
    "logprob": Arm(
        "Would the expert's own likelihood do? The excess is that of -log p under the supervised "
        "policy, calibrated on the same expert tokens.",
        "logprob",
        {"dense": ("expert={sft}", "experts={solutions}", "held_out={n_held_out}")},
        beside="calibrated",
    ),
    "calibrated-online": Arm(
        "Does it help to update the flow online?", "calibrated-online", FLOW, beside="calibrated"
    ),
    "calibrated-token": Arm(
        "Does it help to say where in a response the excess is?",
        "calibrated-token",
        FLOW,
        beside="calibrated",
    ),
    "calibrated-standardised": Arm(
        "Does it help to standardise latents?",
        "calibrated",
        {"flow": "{standardised_flow}"},
        beside="calibrated",
    ),
}
for times in LONGER:
    ARMS[f"calibrated-{times}x"] = Arm(
        f"Does a flow help that has had {times} times as many passes over the expert solutions?",
        "calibrated",
        {"flow": f"{{flow_{times}x}}"},
        beside="calibrated",
    )


# ---- What several runs share
@dataclass(frozen=True)
class Preparation:
    """Something that is made once, before the runs that need it."""

    script: tuple[str, ...]  # with its first arguments
    settings: dict[str, object]
    product: str  # what {NAME} stands for, in its folder
    preset: str | None = None  # script whose settings for the world it takes, too


OFFLINE = {"data": "{solutions}", "held_out": "{n_held_out}", "calibrate_at": (0.2, 0.5, 0.8)}
PREPARATIONS = {
    "flow": Preparation(("train_flow.py",), OFFLINE, "flow", "train_flow"),
    "default_flow": Preparation(
        ("train_flow.py",),
        {"data": "{solutions}", "epochs": 12, "flow_blocks": 1},  # of the world toy
        "flow",
        "train_flow",
    ),
    "standardised_flow": Preparation(
        ("train_flow.py",), {**OFFLINE, "standardise": True}, "flow", "train_flow"
    ),
    "hasty_solutions": Preparation(
        ("study/hasty.py",),
        {"model": "{base}", "data": "{problems}", "like": "{solutions}"},
        "solutions.jsonl",
    ),
    "hasty_flow": Preparation(
        ("train_flow.py",), {**OFFLINE, "data": "{hasty_solutions}"}, "flow", "train_flow"
    ),
    # at such a rate no weight changes, and the calibration is the same
    "untrained_flow": Preparation(
        ("train_flow.py",), {**OFFLINE, "lr": 1e-30, "epochs": 1}, "flow", "train_flow"
    ),
    "sft": Preparation(SFT, RLVR, "policy", "train_rl"),
    "scale_noise": Preparation(
        ("study/scale.py",),
        {"shaping": "{rewards}/noise.py", "dense_on": "response", "dense_coef": 1.0},
        "coefficient.txt",
        "train_rl",
    ),
}
for times in LONGER:
    PREPARATIONS[f"flow_{times}x"] = Preparation(
        ("train_flow.py",), {**OFFLINE, "epochs": times * FLOW_EPOCHS}, "flow", "train_flow"
    )


# ---- Rewards of files
SHARES = (25, 50, 75, 100)  # percent of a reward's scores that a control puts in other places
# What a reward may ask for, by the names of its settings, and what it gets in a study
GIVEN = {"experts": "{solutions}", "held_out": "{n_held_out}", "expert": "{sft}"}


@dataclass(frozen=True)
class FileReward:
    """A dense reward of a file, with the settings that it gets in a study."""

    name: str  # that of the file unless another is given
    file: Path
    kind: type[DenseReward]  # its class
    own: dict[str, str]  # of the file: NAME=VALUE of --dense
    settings: dict[str, object]  # of train_rl.py

    @property
    def scale(self) -> str:
        """The name of the preparation that finds its coefficient."""
        stem = re.sub(r"\W", "_", self.name.removesuffix(".py"))
        return f"coefficient_of_{stem}"

    @property
    def path(self) -> str:
        """The file's path, the same on every machine if it is one of study/rewards/."""
        file = self.file.resolve()
        return f"{{rewards}}/{file.name}" if file.parent == REWARDS else str(file)

    def shaping(self, **changes: str) -> dict[str, object]:
        """Return the settings that train with the reward, some of its own changed."""
        own = {**self.own, **changes}
        return {"shaping": self.path, "dense": as_pairs(own), **self.settings}

    def shuffled_name(self, share: int) -> str:
        """Return the name of the control in which a share of its scores has other places."""
        return f"{self.name}-shuffled-{share}"

    def shuffled(self, share: int) -> dict[str, object]:
        """Return the settings that train with it, a share of its scores in other places."""
        among = "responses" if self.settings["dense_on"] == "response" else "tokens"
        control = {"of": self.path, "among": among, "share": str(share / 100)}
        return {
            "shaping": "{rewards}/shuffled.py",
            "dense": as_pairs({**control, **self.own}),
            **self.settings,
        }

    def untrained(self) -> dict[str, object] | None:
        """Return the settings that train with weights that never learn, None if it has no weights."""
        if issubclass(self.kind, FlowReward):
            return {**self.shaping(), "flow": "{untrained_flow}", "flow_lr": 0.0}
        if "steps" in names_of_settings(self.kind):
            return self.shaping(steps="0")
        return None

    def arms(self) -> dict[str, Arm]:
        """Return the arms in which it is tried."""
        asks = f"Does {self.name} help?"
        arms = {self.name: Arm(asks, "rlvr", self.shaping())}
        for share in SHARES:
            arms[self.shuffled_name(share)] = Arm(
                f"Does it with {share} % of its scores in other places?",
                "rlvr",
                self.shuffled(share),
                beside=self.name,
            )
        if "experts" in self.own:
            arms[f"{self.name}-wrong"] = Arm(
                "Does it if it is fitted to wrong solutions of the base model?",
                "rlvr",
                self.shaping(experts="{hasty_solutions}"),
                beside=self.name,
            )
        untrained = self.untrained()
        if untrained:
            asks = "Does it need weights that have learnt?"
            arms[f"{self.name}-untrained"] = Arm(asks, "rlvr", untrained, beside=self.name)
        return arms

    def preparations(self) -> dict[str, Preparation]:
        """Return what is measured before its runs."""
        if self.settings["dense_coef"] != f"{{{self.scale}}}":
            return {}
        settings = {**self.shaping(), "dense_coef": 1.0}
        return {
            self.scale: Preparation(
                ("study/scale.py",), settings, "coefficient.txt", preset="train_rl"
            )
        }


def files_of(file: Path) -> list[Path]:
    """Return the file of a reward and those beside it that it imports, by name or by their path."""
    found = [file]
    for each in found:
        for node in ast.walk(ast.parse(each.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            elif isinstance(node, ast.Constant) and re.fullmatch(r"\w+\.py", str(node.value)):
                names = [node.value.removesuffix(".py")]  # as in import_file()
            for name in names:
                beside = file.with_name(f"{name}.py")
                if beside.is_file() and beside not in found:
                    found.append(beside)
    return found


def names_of_settings(kind: type[DenseReward]) -> set[str]:
    """Return the names of the settings that a dense reward has of its own."""
    return {field.name for field in dataclasses.fields(kind.Settings)}


def as_pairs(values: dict[str, str]) -> tuple[str, ...]:
    """Return values as the texts NAME=VALUE of --dense."""
    return tuple(f"{name}={value}" for name, value in values.items())


def read_reward(text: str) -> FileReward:
    """Read [NAME=]FILE.py[:SETTING=VALUE,…] with settings of train_rl.py or of the file.

    A reward acts on the mean of a response unless dense_on says otherwise. Its coefficient is found
    by scale.py unless dense_coef is given. Raises ValueError if the file has no reward.
    """
    named, _, changes = text.partition(":")
    name, _, path = named.rpartition("=")
    file = Path(path)
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"reward {text!r}: no file {path!r}; expected a Python file, FILE.py")
    if not re.fullmatch(r"[\w.-]*", name):
        raise ValueError(f"reward {text!r}: expected letters, digits and .-_ in its name {name!r}")
    kind = getattr(import_file(str(file)), "Reward", None)
    if not (isinstance(kind, type) and issubclass(kind, DenseReward)):
        raise ValueError(f"{file} defines no class Reward(dense.DenseReward)")
    asked = names_of_settings(kind)
    own = {setting: value for setting, value in GIVEN.items() if setting in asked}
    taken = asked & {"of", "among", "share"}
    if taken:
        raise ValueError(
            f"{file} has settings called {', '.join(sorted(taken))}, as rewards/shuffled.py "
            "has, which makes its controls: give them other names"
        )
    settings = {"dense_on": "response"}
    if issubclass(kind, FlowReward):
        settings["flow"] = "{flow}"
    for setting, value in read_changes(changes).items():
        (own if setting in asked else settings)[setting] = value
    check_settings(settings, f"reward {text!r}")
    reward = FileReward(name or file.name, file, kind, own, settings)
    settings.setdefault("dense_coef", f"{{{reward.scale}}}")
    return reward


# ---- All there is
@dataclass(frozen=True)
class Catalogue:
    """The arms of a study and what they need, by name."""

    arms: dict[str, Arm]
    preparations: dict[str, Preparation]

    def find(self, text: str) -> Arm:
        """Return the arm NAME, or NAME:SETTING=VALUE,… with changed settings.

        They are settings of train_rl.py, of the arm's own script, or of the file of its reward.
        """
        name, _, changes = text.partition(":")
        if name not in self.arms:
            raise ValueError(
                f"arm {text!r}: {name!r} is unknown; expected one of {', '.join(self.arms)}"
            )
        arm = self.arms[name]
        changed = read_changes(changes)
        script = list(arm.script)
        for flag in script[1:-1]:
            if flag.startswith("--") and flag[2:] in changed:
                script[script.index(flag) + 1] = str(changed.pop(flag[2:]))
        own = {each: changed.pop(each) for each in changed.keys() & own_settings(arm)}
        if own:
            changed["dense"] = as_pairs({**as_values(arm.settings.get("dense", ())), **own})
        check_settings(changed, f"arm {text!r}")
        return replace(arm, script=tuple(script), prepared={**arm.prepared, **changed})


def own_settings(arm: Arm) -> set[str]:
    """Return the names of the settings that the file of an arm's reward has, if there is one."""
    shaping = str(arm.settings["shaping"])
    if not shaping.endswith(".py"):
        return set()
    return names_of_settings(import_file(shaping.format(rewards=REWARDS)).Reward)


def read_changes(text: str) -> dict[str, object]:
    """Read SETTING=VALUE,SETTING=VALUE,… where a VALUE may be several with commas between them."""
    changed: dict[str, object] = {}
    setting = ""
    for one in filter(None, text.split(",")):
        name, equals, value = one.partition("=")
        if not equals and setting:  # one more value of the setting before
            before = changed[setting]
            changed[setting] = (*(before if isinstance(before, tuple) else (before,)), one)
            continue
        setting = name
        changed[setting] = {"True": True, "False": False}.get(value, value)
    return changed


def check_settings(settings: dict[str, object], whose: str) -> None:
    """Raise ValueError for a name that is no setting of train_rl.py, or a value that it does not take."""
    kinds = kinds_of(train_rl.Config())
    unknown = sorted(settings.keys() - kinds.keys())
    if unknown:
        raise ValueError(f"{whose}: {unknown} are no settings of train_rl.py")
    for name, value in settings.items():
        if "{" in str(value):  # a placeholder stands for it
            continue
        meant = value_of(value, kinds[name])
        if not is_of_kind(meant, kinds[name]):
            raise ValueError(f"{whose}: {name}={value}: expected {describe(kinds[name])}")
        try:
            check_values(change(train_rl.Config(), **{name: meant}))
        except ValueError as error:
            raise ValueError(f"{whose}: {error}") from error


def value_of(value: object, kind: object) -> object:
    """Return what a value stands for that is a text, or several texts, of the command line."""
    values = value if isinstance(value, tuple) else (value,)
    meant = tuple(from_text(one, kind) if isinstance(one, str) else one for one in values)
    return meant[0] if len(meant) == 1 and not is_of_kind(meant, kind) else meant


def make_catalogue(rewards: Sequence[FileReward] = ()) -> Catalogue:
    """Return all arms: those that are always there, and those of some rewards of files."""
    arms = dict(ARMS)
    preparations = dict(PREPARATIONS)
    for reward in rewards:
        if reward.name in arms:
            raise ValueError(
                f"two rewards are called {reward.name}: judge one at a time, or copy the "
                "file under another name"
            )
        arms |= reward.arms()
        preparations |= reward.preparations()
    return Catalogue(arms, preparations)


def to_flags(settings: dict[str, object]) -> list[str]:
    """Return settings as command-line flags."""
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags += [f"--{flag}", str(value)]
    return flags
