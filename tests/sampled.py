"""Joins the parameters of single views to the parameters of a batch."""

from __future__ import annotations

import numpy as np

from mocofast.data.interface import ViewParams
from mocofast.data.sampling import Views


def stack_views(params: list[ViewParams]) -> Views:
    """Returns the parameters with one view per row: the inverse of `per_view`."""
    columns = dict(zip(ViewParams._fields, zip(*params)))
    columns["order"] = tuple(order or (-1,) * 4 for order in columns["order"])
    return Views(**{name: np.array(column) for name, column in columns.items()})
