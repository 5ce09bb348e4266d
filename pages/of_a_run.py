"""The pages of a run's folder: report.html, its curves, and rollouts.html beside it."""

from pathlib import Path

from infra import record
from infra.parallel import is_first
from pages.curves import write_run_report
from pages.rollouts import inspect_run

REPORT = "report.html"


def write_report(folder: Path) -> None:
    """Write the curves of what a run has logged so far, on the first rank."""
    if is_first():
        write_run_report([folder], folder / REPORT)


def write_pages(folder: Path) -> Path:
    """Write the pages of a run that has ended, on the first rank; return the path of its report."""
    if is_first() and record.find_files(folder):
        inspect_run(folder)
    write_report(folder)
    return folder / REPORT
