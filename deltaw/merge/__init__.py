"""Make a change permanent, on disk: plan, check, apply; file by file, with no whole model in memory."""

from deltaw.core.survival import SiteChange
from deltaw.merge.folder import MergeReport, merge_files

__all__ = ["MergeReport", "SiteChange", "merge_files"]
