"""What all runs of a study need, looked at before the first: a wrong name is one fault, not one for each run."""

from __future__ import annotations

from collections.abc import Callable

from deltaw.bases.sources import find_base
from deltaw.compare.config import StudyConfig
from deltaw.data import find_layout, judged_split, open_source
from deltaw.errors import DataError, DeltawError, Fault
from deltaw.train.metrics import EXECUTION


def check_inputs(config: StudyConfig) -> None:
    """Refuse a study whose base is not there, or whose data is not there or of no known form. All faults at once.

    The class of the error is that of the first fault: BaseModelError for the base, DataError for data.
    """
    found: list[DeltawError] = []

    def look(at: Callable[[], object]) -> None:
        try:
            at()
        except DeltawError as error:
            found.append(error)

    look(lambda: find_base(config.train.model))
    look(lambda: _check_data(config, config.train.data, "train"))
    if (test := config.test) is not None:
        look(lambda: _check_data(config, test, judged_split(test)))
    if found:
        faults: list[Fault | str] = [fault for error in found for fault in error.faults]
        raise type(found[0])(*faults)


def _check_data(config: StudyConfig, source: str, split: str) -> None:
    layout = find_layout(open_source(source, split), config.train.columns or None, task=config.train.task)
    judges = source == (config.test or config.train.data)
    if judges and EXECUTION in config.train.metrics and not {"database", "table"} & set(layout.columns):
        raise DataError(Fault(source, "names nothing that the queries can be asked of",
                              "a column 'database' with an SQLite file, or 'table' with a header and rows",
                              "The figure execution needs one; other columns: columns database=NAME or table=NAME"))
