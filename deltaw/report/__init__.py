"""What a verb leaves to look at: one self-contained HTML page, put together from the blocks in `report.page`."""

from deltaw.report.analysis import analysis_page
from deltaw.report.page import write_page
from deltaw.report.training import report_page, write_report

__all__ = ["analysis_page", "report_page", "write_page", "write_report"]
