"""Pages to read a run or an evaluation by: HTML files that need no network. What runs need of it."""

from pages.describe import DensePart, Recording, make_records
from pages.of_a_run import write_pages, write_report

__all__ = ["DensePart", "Recording", "make_records", "write_pages", "write_report"]
