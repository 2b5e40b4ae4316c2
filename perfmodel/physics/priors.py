"""What is believed of a fitted constant before anything is measured."""

from typing import NamedTuple


class Prior(NamedTuple):
    """How far a fit may move a constant from its default: one sigma in natural log units (or in `unit` where the
    constant may be zero and is fitted as it is), and the range it must stay in.

    An `anchor` is a constant that a calibration measures apart from the fit; its prior weighs as much as the data of a
    few dozen independent shapes would, however many rows those have, while other priors decide only what data leave
    open.
    """

    sigma: float
    low: float
    high: float
    unit: float | None = None
    anchor: bool = False
