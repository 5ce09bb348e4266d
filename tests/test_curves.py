"""A run at a glance: the page's figures, its charts in Chromium, and where training writes it."""

import json
import re
from pathlib import Path

import pytest
from test_inspector import one_record

import train_rl
from infra.settings import change
from pages import of_a_run, write_report
from pages.curves import (
    Scale,
    line_of,
    log_ticks,
    padded,
    read_run,
    shorten,
    ticks,
    window_means,
    write_run_report,
)
from run import report

AVG = {"avg": {"mean": 0.25, "low": 0.125, "high": 0.5}}


def write_run(folder: Path, n_steps: int = 4, **settings) -> Path:
    """Write what a run of training leaves, with figures that follow from the step."""
    folder.mkdir()
    nested = {"model": "toy", "lr": 0.1, "sampling": {"prompts": 16, "group_size": 8}} | settings
    (folder / "config.json").write_text(json.dumps(nested))
    lines = []
    for step in range(1, n_steps + 1):
        line = {"step": step, "reward": step / 8, "flow/score": 10.0 - step, "mine": -1.0 * step}
        line |= {"time/step": 2.0, "grader/capped": 0.0}
        line |= {"policy/grad_norm": 1.0 + step, "flow/grad_norm": 2.0 + step}
        if step == 2:
            line |= {"eval/test/greedy": 0.5, "eval/test/greedy/low": 0.25}
            line |= {"eval/test/greedy/high": 0.75}
        lines.append(json.dumps(line) + "\n")
    lines.append('{"step": 99, "rew')  # being written
    (folder / "metrics.jsonl").write_text("".join(lines))
    summary = {when: {"test": {"greedy": AVG}} for when in ("before", "after")}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def data_of(page: str) -> list[dict]:
    """The charts that the page's script reads."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])["charts"]


# ---- The file
def test_lines_are_the_figures(tmp_path):
    path = write_run_report([write_run(tmp_path / "a")], tmp_path / "report.html")
    page = path.read_text()
    charts = {chart["title"]: chart for chart in data_of(page)}
    assert charts["Reward"]["lines"][0]["values"] == [0.125, 0.25, 0.375, 0.5]
    assert charts["mine"]["lines"][0]["values"] == [-1, -2, -3, -4], "a figure that nobody foresaw"
    gradients = {line["name"]: line["values"] for line in charts["Gradient norm"]["lines"]}
    assert gradients == {"policy": [2, 3, 4, 5], "flow": [3, 4, 5, 6]}
    assert [line["name"] for line in charts["Reward"]["lines"]] == [""]
    assert "grader/capped" not in charts
    assert "The same in every step: Seconds a step 2, grader/capped 0." in page
    assert "Mean outcome reward of the step&#x27;s responses." in page, "what a chart shows"
    (accuracy,) = charts["Accuracy on test, 95 % intervals"]["lines"]
    assert accuracy["steps"] == [0, 2, 4]
    assert accuracy["values"] == [0.25, 0.5, 0.25]
    assert accuracy["low"] == [0.125, 0.25, 0.125] and accuracy["high"] == [0.5, 0.75, 0.5]
    assert "<tr><th scope=row>a<td>4<td>0.5<td>6<td>2" in page, "of the last tenth of the steps"
    assert "Settings that differ" not in page
    assert not re.search("https?:", page)


def test_several_runs_and_the_settings_that_differ(tmp_path):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b <1>", 6, lr=0.2, extra="x")]
    page = write_run_report(folders, tmp_path / "report.html").read_text()
    charts = {chart["title"]: chart for chart in data_of(page)}
    assert [line["name"] for line in charts["Reward"]["lines"]] == ["a", "b <1>"]
    assert charts["Reward"]["last"] == 6
    differing = page.partition("Settings that differ")[2].partition("<details>")[0]
    assert "<th scope=row>lr<td>0.1<td>0.2" in differing
    assert "<th scope=row>extra<td>null<td>x" in differing
    assert "prompts" not in differing
    assert "b &lt;1&gt;" in page and "b <1>" not in page


def write_figures(folder: Path, lines: list[dict], settings: dict | None = None) -> Path:
    """Write a run of some figures, the first ones of step 1."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model": "toy"} | (settings or {})))
    rows = [json.dumps({"step": step, **line}) + "\n" for step, line in enumerate(lines, 1)]
    (folder / "metrics.jsonl").write_text("".join(rows))
    return folder


def test_equal_curves_are_drawn_once(tmp_path):
    lines = [{"reward": x, "correct": x, "reward/binary": x, "length": 2 * x} for x in (0.5, 0.75)]
    folder = write_figures(tmp_path / "a", lines)
    page = write_run_report([folder], tmp_path / "report.html").read_text()
    assert [chart["title"] for chart in data_of(page)] == ["Reward", "Tokens a response"]
    for title in ("Right answers in training", "reward/binary"):
        assert f"{title} has the curve of Reward." in page


def test_two_evaluations_are_points_and_three_a_line(tmp_path):
    scores = {"eval/test/greedy": 0.5, "eval/test/greedy/low": 0.25, "eval/test/greedy/high": 0.75}
    for n, n_lines in ((2, 0), (3, 1)):
        lines = [{"reward": 0.5, **scores} for _ in range(n)]
        folder = write_figures(tmp_path / str(n), lines)
        page = write_run_report([folder], tmp_path / "report.html").read_text()
        accuracy = page.partition("Accuracy on test")[2].partition("</svg>")[0]
        assert accuracy.count("<circle") == n and accuracy.count("<polyline") == n_lines


@pytest.mark.parametrize("name", ["flow", "ridge"])
def test_does_the_dense_reward_rank_right_above_wrong(tmp_path, name):
    """A row of bars and a count; a step without wrong responses has none."""
    right = [-0.5, -0.1, -0.2, -0.1]
    lines = []
    for step, reward in enumerate(right):
        line = {"reward": 0.5, f"{name}/share": 0.1 * step, f"{name}/reward_right": reward}
        if step < 3:
            line[f"{name}/reward_wrong"] = -0.25
        lines.append(line)
    folder = write_figures(tmp_path / "a", lines)
    page = write_run_report([folder], tmp_path / "report.html").read_text()
    row = data_of(page)[0]
    assert row["title"] == f"{name} reward of right responses minus that of wrong ones"
    assert row["lines"][0]["values"] == pytest.approx([-0.25, 0.15, 0.05])
    assert f"The {name} reward of right responses is above that of wrong ones in 2 of 3" in page
    assert re.findall(r"<rect class=(\w+)", page) == ["below", "above", "above"]


def test_the_deviation_has_the_level_of_experts(tmp_path, flow_folder):
    """The mean over taps of 0.8/0.2 * the error that the flow's file has, on a logarithmic axis."""
    settings = {"flow": flow_folder, "flow_reward": {"reward_times": [0.8]}}
    lines = [{"flow/score": score} for score in (40.0, 5.0)]
    folder = write_figures(tmp_path / "a", lines, settings)
    path = tmp_path / "report.html"
    assert ">experts " not in write_run_report([folder], path).read_text(), "it has no flow.json"
    (folder / "flow.json").write_text(json.dumps({"calibrated_at": [0.5, 0.8]}))
    page = write_run_report([folder], path).read_text()
    (chart,) = data_of(page)
    assert chart["level"] == pytest.approx(4.0) and chart["is_log"]
    labels = re.findall(r"text-anchor=end>(.*?)<", page)
    assert labels[:3] == ["5", "10", "20"] and ">experts 4<" in page
    excess = write_figures(tmp_path / "b", [{"flow/score": -1.0}], {"flow_scope": "expert"})
    (chart,) = data_of(write_run_report([excess], path).read_text())
    assert chart["level"] == 0 and not chart["is_log"]


def write_rollouts(folder: Path, steps: list[int], text: str = "") -> Path:
    """Write rollouts of some steps into a run's folder, which it returns."""
    (folder / "rollouts").mkdir()
    for step in steps:
        (folder / "rollouts" / f"step-{step}.jsonl").write_text(text)
    return folder


def test_falls_are_named_and_linked_where_they_are_recorded(tmp_path):
    lines = [{"reward": x} for x in [0.5] * 8 + [0.6, 0.5, 0.3, 0.25, 0.5, 0.25]]
    folder = write_figures(tmp_path / "a", lines)
    page = write_run_report([folder], folder / "report.html").read_text()
    assert (
        "<b>The reward fell</b> at steps 11 (0.30) to 12 (0.25, the lowest), 14 (0.25): the mean reward of such a "
        "step lies more than 0.15 below the mean of the 3 or of the 10 steps before it. "
        "The best step before step 11 was 9 (0.60).</p>" in page
    )
    write_rollouts(folder, [1, 10, 14])
    (folder / "rollouts.html").write_text("")
    page = write_run_report([folder], folder / "report.html").read_text()
    assert "12 (0.25, the lowest), <a href=rollouts.html#step=14>14</a> (0.25):" in page
    assert "The last recorded step before is <a href=rollouts.html#step=10>10</a> (0.50)." in page


def test_where_nothing_is_a_fall_the_deepest_step_is_named(tmp_path):
    lines = [{"reward": 0.5}] * 10 + [{"reward": 0.45}, {"reward": 0.375}, {"reward": 0.5}]
    page = write_run_report([write_figures(tmp_path / "a", lines)], tmp_path / "report.html")
    assert (
        "<b>The reward fell most</b> at step 12 (0.38): 0.12 below the mean of the 3 or of the 10 steps before it. The best step before step 12 was 10 (0.50)."
        in page.read_text()
    )


def test_a_report_makes_the_page_that_it_leads_to(tmp_path, capsys):
    """Beside a page elsewhere, and before a run ends, there is none: the command is named."""
    folder = write_rollouts(write_run(tmp_path / "a"), [1], json.dumps(one_record(0, 0, ["x"])))
    command = f"<code>python inspector.py {folder}</code> makes a page of its responses."
    write_report(folder)
    assert command in (folder / "report.html").read_text()
    report((str(folder),), str(tmp_path / "elsewhere.html"))
    assert command in (tmp_path / "elsewhere.html").read_text()
    assert not (folder / "rollouts.html").exists()
    report((str(folder),))
    page = (folder / "report.html").read_text()
    assert "<a href=rollouts.html>rollouts.html</a>" in page and command not in page
    assert "Rollouts of a" in (folder / "rollouts.html").read_text()


def test_long_runs_are_averaged(tmp_path):
    run = read_run(write_run(tmp_path / "a", 900))
    line = line_of(run, "reward", "", 0)
    assert len(line.values) == 300 and line.steps[:2] == [3, 6]
    assert line.values[0] == pytest.approx((1 + 2 + 3) / 3 / 8)
    assert line_of(run, "nothing", "", 0) is None


def test_axes():
    assert ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(-3, 27, 5) == [0, 10, 20]
    assert padded(0.0, 1.0) == (0.0, 1.06)
    assert padded(-1.0, 0.0) == (-1.06, 0.0)
    assert padded(0.0, 0.0) == (0.0, 1.0)
    low, high = padded(1.0, 1.00001)
    labels = [shorten(tick, 5) for tick in ticks(low, high, 5)]
    assert len(set(labels)) == len(labels) >= 3, "labels that differ"
    assert log_ticks(0.9, 60) == [1, 2, 5, 10, 20, 50]
    assert Scale(1, 100, 0, 10, is_log=True).place(10) == pytest.approx(5)
    assert len(log_ticks(4.2, 4.9)) >= 3, "within a factor of 2 the ticks are even"
    assert window_means([1.0, 2.0]) == [1, 2]
    assert window_means([float(i) for i in range(24)])[1] == 1


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(
        ValueError, match="config.json does not exist; expected the folder of a run"
    ):
        report((str(tmp_path),))
    folder = write_run(tmp_path / "a")
    (folder / "metrics.jsonl").write_text('{"step"')
    with pytest.raises(ValueError, match="metrics.jsonl has no line; expected a run with a step"):
        report((str(folder),))


def test_where_the_pages_of_runs_go(tmp_path, capsys):
    folders = [str(write_run(tmp_path / name)) for name in "ab"]
    report(tuple(folders[:1]))
    report(tuple(folders))
    report(tuple(folders), str(tmp_path / "other.html"))
    assert capsys.readouterr().out.splitlines() == [
        f"open {tmp_path / 'a' / 'report.html'}",
        f"open {tmp_path / 'report.html'}",
        f"open {tmp_path / 'other.html'}",
    ]


def test_training_says_which_file_to_open(config, capsys):
    """The last line, after a page at each checkpoint; it leads to the page of rollouts."""
    train_rl.main(change(config, save_every=1))
    report = Path(config.folder) / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == f"open {report} to see what happened"
    page = report.read_text()
    assert "2 steps in" in page and "<a href=rollouts.html>" in page
    assert (Path(config.folder) / "rollouts.html").exists()


def test_a_run_has_a_page_at_each_checkpoint(config, monkeypatch):
    pages = []
    write = of_a_run.write_run_report

    def spy(folders, path):
        write(folders, path)
        pages.append(data_of(path.read_text())[0]["last"])

    monkeypatch.setattr(of_a_run, "write_run_report", spy)
    train_rl.main(change(config, steps=3, save_every=2, log_rollouts=0))
    assert pages == [2, 3, 3], "with the last checkpoint, and once more with the last evaluation"
    assert not (Path(config.folder) / "rollouts.html").exists()


# ---- The page in a browser
@pytest.mark.browser
def test_values_are_read_off_the_charts(browser, tmp_path):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", 6)]
    path = write_run_report(folders, tmp_path / "report.html")
    browser.open(path, "document.querySelector('figure svg')")
    figure = (
        "[...document.querySelectorAll('figure')].find(f => f.textContent.startsWith('Reward'))"
    )
    browser.js(f"{figure}.querySelector('svg').focus()")
    shown = f"[...{figure}.querySelectorAll('b')].map(b => b.textContent)"
    assert browser.js(shown) == ["0.5", "0.75"]
    browser.press("\ue012")  # left arrow
    assert browser.js(shown) == ["–", "0.625"]
    assert browser.js(f"{figure}.querySelector('small').textContent") == "step 5"
    box = browser.js(
        f"(r => [r.left, r.top, r.width])({figure}.querySelector('svg').getBoundingClientRect())"
    )
    x = box[0] + box[2] * 50 / 360  # the left end of the axis
    browser.js(
        f"{figure}.querySelector('svg').dispatchEvent("
        f"new PointerEvent('pointermove', {{clientX: {x}, clientY: {box[1] + 9}}}))"
    )
    assert browser.js(shown) == ["0.125", "0.125"]
    small = "[...new Set([...document.querySelectorAll('figure small')].map(s => s.textContent))]"
    assert browser.js(small) == ["step 0", "step 1"], "all charts move; an evaluation is at 0"
    points = browser.js(f"{figure}.querySelector('.mean').getAttribute('points')").split()
    heights = [float(point.split(",")[1]) for point in points]
    assert heights == sorted(heights, reverse=True), "a rising line rises"
    assert browser.log("browser") == []


@pytest.mark.browser
@pytest.mark.parametrize("how", ["key", "click", "link"])
def test_a_chart_leads_to_the_nearest_recorded_step(browser, tmp_path, how):
    """The link says which; the page of rollouts gets the step that was pointed at, and says so, too."""
    folder = write_figures(tmp_path / "a", [{"reward": 0.01 * step} for step in range(30)])
    write_rollouts(folder, [1, 11, 21])
    (folder / "rollouts.html").write_text("<title>Rollouts</title>")
    browser.open(
        write_run_report([folder], folder / "report.html"), "document.querySelector('svg')"
    )
    browser.js("document.querySelector('figure svg').focus()")
    for _ in range(4):
        browser.press("\ue012")  # left arrow, from step 30 to 26
    assert browser.js("document.querySelector('#at a').textContent") == (
        "Responses of step 21, the nearest that is recorded"
    )
    if how == "key":
        browser.press("\ue007")  # Enter
    elif how == "link":
        browser.js("document.querySelector('#at a').click()")
    else:
        box = browser.js(
            "(r => [r.left, r.top, r.width])(document.querySelector('svg').getBoundingClientRect())"
        )
        x = box[0] + box[2] * (50 + 300 * 25 / 29) / 360  # step 26
        event = f"new PointerEvent('click', {{clientX: {x}, clientY: {box[1] + 9}}})"
        browser.js(f"document.querySelector('svg').dispatchEvent({event})")
    browser.wait("document.title === 'Rollouts' && location.hash === '#step=26'")


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_charts_fit_the_window(browser, tmp_path, width):
    path = write_run_report([write_run(tmp_path / "a")], tmp_path / "report.html")
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.cdp("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.open(path, "document.querySelector('figure svg')")
        assert browser.js("document.documentElement.scrollWidth") <= width
        assert browser.js("document.querySelector('svg').clientWidth") > 300
    finally:
        browser.cdp("Emulation.clearDeviceMetricsOverride", {})
