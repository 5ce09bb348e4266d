"""Rollouts of a run: what is written, from the tensors of the step, and that it changes nothing."""

import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, figures

import rlfr
import train_rl
from infra import record
from infra.metrics import read_metrics
from infra.settings import change
from pages import Recording, describe
from pages import falls as falls_of
from policy import tap_layers
from worlds import toy

sys.path.append(str(ROOT / "benchmarks"))
import recording  # noqa: E402

PER_TOKEN = ("logp", "entropy", "dense_reward", "advantage", "ratio")


def test_records_hold_the_tensors_of_the_step(config, seen, monkeypatch):
    monkeypatch.setattr(record, "N_GROUPS", 2)
    train_rl.main(change(config, log_rollouts=1))
    files = record.need_files(config.folder)
    assert list(files) == [1, 2]
    for step, (experience, advantage, flow_reward) in enumerate(seen):
        episodes = experience.episodes
        outcomes = rlfr.outcome_advantage(experience.reward, 4, "grpo")
        records = record.read(files[step + 1])
        assert [(one["group"], one["sample"]) for one in records] == [
            (group, sample) for group in range(2) for sample in range(4)
        ]
        for i, one in enumerate(records):
            length = len(episodes[i].response_ids)
            tensors = {
                "logp": experience.old_logp,
                "entropy": experience.entropy,
                "dense_reward": flow_reward,
                "advantage": advantage,
            }
            for name, values in tensors.items():
                assert one[name] == pytest.approx(values[i, :length].tolist(), rel=1e-5), name
            assert one["outcome"] == pytest.approx(outcomes[i].item(), rel=1e-5)
            assert one["dense_score"][1] == pytest.approx(
                experience.dense_score[1, i, :length].tolist(), rel=1e-5
            )
            mean = torch.tensor(one["dense_score"]).mean(dim=0)
            torch.testing.assert_close(mean, experience.score[i, :length], rtol=1e-4, atol=1e-6)
            assert one["ratio"] == pytest.approx([1.0] * length, rel=1e-3)
            assert one["token_ids"] == episodes[i].response_ids
            verdict = episodes[i].verdict
            assert (one["reward"], one["verdict"]) == (verdict.reward, verdict.kind)
            assert one["step"] == step + 1
            assert one["problem"] == episodes[i].problem.id
            assert one["prompt"] == one["question"] == episodes[i].problem.text
        assert len({one["prompt"] for one in records}) == 2
    taps = tap_layers(3, (0.25, 0.5, 0.75))
    assert records[0]["taps"] == taps


def test_figures_do_not_depend_on_the_record(config):
    for name, every in (("with", 1), ("without", 0)):
        train_rl.main(change(config, folder=config.folder + name, log_rollouts=every))
    assert figures(config.folder + "with") == figures(config.folder + "without")
    assert not Path(config.folder + "without", "rollouts").exists()
    with pytest.raises(ValueError, match="has no rollouts/step-N.jsonl; expected the folder of a"):
        record.need_files(config.folder + "without")


def test_what_recording_costs_is_measured_in_pairs(config, tmp_path):
    """Both runs of a pair take CPU time; figures that differ would be an error."""
    for number in range(2):
        pair = recording.run_pair(config, number, tmp_path)
        assert pair["with"] > 0 and pair["without"] > 0
        kept = {every: tmp_path / f"pair-{number}-every-{every}" / "rollouts" for every in (0, 1)}
        assert kept[1].exists() and not kept[0].exists()
    with pytest.raises(ValueError, match="steps=1, pairs=5: expected 2 steps or more"):
        recording.main(recording.Settings(steps=1))


def test_figures_of_right_and_of_wrong_episodes(config, seen):
    train_rl.main(change(config, steps=1))
    ((experience, _, flow_reward),) = seen
    episodes = experience.episodes
    (line,) = figures(config.folder)
    lengths = [len(episode.response_ids) for episode in episodes]
    for name, is_right in (("right", True), ("wrong", False)):
        chosen = [i for i, one in enumerate(episodes) if one.verdict.correct == is_right]
        assert chosen
        total = sum(experience.score[i].sum().item() for i in chosen)
        n_tokens = sum(lengths[i] for i in chosen)
        rewards = [flow_reward[i].sum().item() for i in chosen]
        assert line[f"flow/score_{name}"] == pytest.approx(total / n_tokens, rel=1e-5)
        assert line[f"flow/reward_{name}"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-5)
    n_rewarded = int((flow_reward != 0).sum())
    assert line["flow/share"] == pytest.approx(n_rewarded / sum(lengths))
    assert line["flow/tokens"] == pytest.approx(n_rewarded / len(episodes))


def test_resuming_removes_the_rollouts_of_lost_steps(config):
    config = change(config, steps=3, save_every=2, log_rollouts=1)
    train_rl.main(change(config, steps=2))
    lost = Path(config.folder) / "rollouts" / "step-7.jsonl"
    lost.write_text("{}\n")
    train_rl.main(change(config, resume=config.folder))
    assert list(record.need_files(config.folder)) == [1, 2, 3]


# ---- Which steps
SIZES = SimpleNamespace(prompts=6, group_size=8, max_tokens=100)


def steps_due(recording: Recording, step: int, reward: torch.Tensor) -> dict[int, list[dict]]:
    """Return what is written after a step: by step its groups, which the step and their number name."""

    def describe(n_groups: int) -> list[dict]:
        return [{"of": step + 1, "groups": n_groups}]

    return dict(recording.due(step, reward, describe))


def test_which_steps_are_written(tmp_path):
    for every, expected in ((10, [1, 11, 21, 24]), (0, [])):
        recording = Recording(every, 24, SIZES, tmp_path)
        written = {}
        for step in range(24):
            written |= steps_due(recording, step, torch.zeros(2))
        assert written == {step: [{"of": step, "groups": record.N_GROUPS}] for step in expected}


# It rises to 0.91, falls at 11, comes back and falls at 16
RISING = [0.47, 0.52, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.86, 0.91, 0.66, 0.75, 0.8, 0.78, 0.8, 0.38]


@pytest.mark.parametrize(
    ("rewards", "falls"),
    [
        ([0.5] * 10 + [0.34], [11]),
        ([0.5] * 10 + [0.36], []),
        ([0.5] * 2 + [0.0], []),  # with too few before
        ([0.5, 0.5, 0.8] + [0.5] * 7, []),  # one high step is none to compare with
        (RISING, [11, 16]),  # regression: the mean of ten steps was low, and named 16 alone
        ([0.62] * 5 + [0.5] * 10 + [0.36, 0.33], [17]),  # the last ten count
        ([1.0] * 10 + [0.0] * 12, [*range(11, 20)]),  # a fall that lasts is the mean after nine
    ],
)
def test_a_step_at_which_the_reward_fell_is_written_whole(tmp_path, rewards, falls):
    """And the one before, to be compared."""
    metrics = [{"step": step, "reward": reward} for step, reward in enumerate(rewards, 1)]
    assert falls_of.find_falls(metrics) == falls
    recording = Recording(1000, 1000, SIZES, tmp_path)
    written = {}
    for step, line in enumerate(metrics):
        reward = torch.tensor([line["reward"] - 0.01, line["reward"] + 0.01])
        written |= steps_due(recording, step, reward)
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    whole = {step for fall in falls for step in (fall - 1, fall)}
    expected = {step: [{"of": step, "groups": SIZES.prompts}] for step in whole}
    assert written == {1: [{"of": 1, "groups": record.N_GROUPS}], **expected}


def test_no_step_of_the_default_runs_is_a_fall():
    """They rise to 0.9 and stay there: study/default-run.json."""
    runs = json.loads((ROOT / "study" / "default-run.json").read_text())["runs"]
    assert len(runs) == 8
    for run in runs:
        lines = [{"step": i, "reward": x} for i, x in enumerate(run["series"]["reward"], 1)]
        assert falls_of.find_falls(lines) == [], run["seed"]


def test_the_step_before_a_fall_is_that_step(config, monkeypatch):
    """Its records, written a step later, are those that it would have got at once."""
    monkeypatch.setattr(record, "N_GROUPS", 4)
    train_rl.main(change(config, steps=4, log_rollouts=1))
    at_once = record.need_files(config.folder)[2].read_bytes()
    monkeypatch.setattr("pages.describe.is_fall", lambda reward, before: len(before) == 2)
    later = change(config, steps=4, log_rollouts=100, folder=config.folder + "-later")
    train_rl.main(later)
    files = record.need_files(later.folder)
    assert list(files) == [1, 2, 3, 4]
    assert files[2].read_bytes() == at_once


def test_a_resumed_run_knows_the_rewards_before(config, monkeypatch):
    """A fall right after the checkpoint is written whole, as in the run that was not stopped."""
    monkeypatch.setattr("pages.falls.WINDOWS", (2,))
    monkeypatch.setattr("pages.describe.N_BEFORE", 2)
    monkeypatch.setattr("pages.falls.FALL", -2.0)  # each step with two before it counts as a fall
    monkeypatch.setattr(record, "N_GROUPS", 1)
    folder = Path(config.folder)
    config = change(config, steps=4, log_rollouts=100, save_every=2, keep=2)
    train_rl.main(config)
    files = record.need_files(folder)
    groups = {step: {one["group"] for one in record.read(file)} for step, file in files.items()}
    assert {step: len(each) for step, each in groups.items()} == {1: 1, 2: 4, 3: 4, 4: 4}
    assert falls_of.find_falls(read_metrics(folder / "metrics.jsonl")) == [3, 4]
    written = {step: file.read_bytes() for step, file in files.items()}
    for lost in ("checkpoints/step-4", "policy", "flow"):
        shutil.rmtree(folder / lost)
    files[3].write_text("to be replaced")
    train_rl.main(change(config, resume=config.folder))
    assert {step: file.read_bytes() for step, file in record.need_files(folder).items()} == written


def test_the_size_that_is_said_holds(config, capsys):
    train_rl.main(change(config, log_rollouts=1))
    said = capsys.readouterr().out
    assert "rollouts of 2 steps go to rollouts/, 16 episodes each: at most about" in said
    assert "and 0.0 MB for each step at which the reward falls" in said
    for path in record.need_files(config.folder).values():
        assert path.stat().st_size < 16 * (16 * describe.BYTES_PER_TOKEN + 1000)


def test_a_negative_interval_is_refused(config):
    with pytest.raises(ValueError, match="--log-rollouts=-1: expected a whole number from 0"):
        train_rl.main(change(config, log_rollouts=-1))


# ---- Token texts


TEXTS = ["  two\n\n lines\t", "naïve — ∑ 日本語 😀👩‍👩‍👧", "سلام עולם", "a<b>&\\n"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "merges"])
def test_texts_of_tokens_are_the_text(merging_tokenizer, text, kind):
    tokenizer = toy.make_tokenizer() if kind == "bytes" else merging_tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = describe.token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text


def test_tokens_of_the_merging_tokenizer_are_parts_of_words_and_of_characters(merging_tokenizer):
    """Else the tests with it would show nothing."""
    ids = merging_tokenizer.encode(" the 😁日本", add_special_tokens=False)
    alone = [describe.text_of_token(merging_tokenizer, token) for token in ids]
    assert alone == [" the", " \ufffd", "\ufffd", "\ufffd", "日", "本"]


@pytest.mark.parametrize("kind", ["bytes", "merges"])
def test_texts_of_any_tokens_are_what_the_tokenizer_decodes(merging_tokenizer, kind):
    """Random tokens: bytes that are no character, beginnings of one, characters in between."""
    tokenizer = toy.make_tokenizer() if kind == "bytes" else merging_tokenizer
    rng = random.Random(0)
    pieces = [*tokenizer.encode("😀日本é", add_special_tokens=False), *range(len(tokenizer))]
    for _ in range(300):
        ids = [rng.choice(pieces[: rng.choice([6, len(pieces)])]) for _ in range(12)]
        assert "".join(describe.token_texts(tokenizer, ids)) == describe.decode(tokenizer, ids)


def test_half_characters_and_special_tokens_have_texts():
    tokenizer = toy.make_tokenizer()
    ids = tokenizer.encode("é")[:1] + tokenizer.encode("a😀")[:-1] + tokenizer.encode("é")
    ids += [tokenizer.eos_token_id]
    broken = describe.BROKEN
    expected = [broken, "a", "", "", broken, "", "é", toy.EOS]
    assert describe.token_texts(tokenizer, ids) == expected


def test_a_long_row_of_half_characters_is_quick():
    tokenizer = toy.make_tokenizer()
    ids = tokenizer.encode("é")[:1] * 20_000
    assert describe.token_texts(tokenizer, ids) == [describe.BROKEN] * 20_000


def test_numbers_keep_six_digits():
    numbers = [1 / 3, float("nan"), None, -12345678.0]
    assert describe.shorten(numbers) == [0.333333, None, None, -12345700.0]


# ---- Elsewhere


def test_tensorboard_gets_a_table(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_rl.main(change(config, steps=1, track="tensorboard"))
    events = EventAccumulator(str(Path(config.folder) / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("rollouts/text_summary")
    lines = event.tensor_proto.string_val[0].decode().splitlines()
    records = record.read(record.need_files(config.folder)[1])
    assert len(lines) == 2 + len(records) == 18
    for line, one in zip(lines[2:], records, strict=True):
        assert json.dumps(one["verdict"]) in line
        assert f"| {len(one['tokens'])} |" in line
