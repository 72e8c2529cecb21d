"""All results in one tidy table, and the one rule for what may stand together.

`results` makes a row of each figure of each run; `idaa_lib.results()` is the same. The runs page,
the notebooks, the report, CSV and Parquet files are views of it: `groups` of evaluations, what
stands `beside` one run, a `table` for people. Published figures, of the paper and of the sibling
systems' READMEs, are docs/paper.csv; they stand only where data, size, classes and network agree.
"""

import sys
import types
from typing import Any

from idaa_lib.results.figures import (
    COLUMNS,
    DAMAGE,
    SHOWN,
    headline,
    interval,
    key_figures,
    means,
    number_text,
    results,
    save,
)
from idaa_lib.results.names import (
    ADVERSARIES,
    JUDGING,
    describe_vae,
    field_text,
    find_differences,
    full_name,
    labels,
    name_of,
    tell_apart,
    title,
    training_of,
    value_text,
)
from idaa_lib.results.tables import (
    PAPER,
    Group,
    beside,
    groups,
    html_table,
    natural,
    paper_name,
    table,
    tabulate,
)


class _Results(types.ModuleType):
    """This module, which is called as `idaa_lib.results()` too: the room and its main function have
    one name."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return results(*args, **options)


sys.modules[__name__].__class__ = _Results
