"""What a run leaves to look at: one self-contained HTML page."""

from deltaw.report.page import report_page, write_report

__all__ = ["report_page", "write_report"]
