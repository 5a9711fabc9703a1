"""Parameters drawn one by one, as those of a batch."""

from __future__ import annotations

import numpy as np

from mocofast.data.interface import ViewParams
from mocofast.data.sampling import Views


def stack_views(params: list[ViewParams]) -> Views:
    """The same parameters, one view per row: the inverse of `per_view`."""
    columns = dict(zip(ViewParams._fields, zip(*params)))
    columns["order"] = tuple(order or (-1,) * 4 for order in columns["order"])
    return Views(**{name: np.array(column) for name, column in columns.items()})
