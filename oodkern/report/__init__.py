"""report.html: a run on one self-contained page."""

from oodkern.report.page import write_report

__all__ = ["write_report"]
