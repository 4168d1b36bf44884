"""A case as a point of a sweep: what grows from point to point, and how fast the cost of it may grow.

fit.py fits the exponents of what is recorded and compares. Only ours is a point; others contend in cases of their own.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.case import Case

ROUNDS = 5
Grows = Mapping[str, tuple[float, str]]  # by field of the record: the largest exponent, and why it is not less


def swept(
    case: Case,
    what: str,
    x: int,
    grows: Grows,
    more: Callable[[Any, Any], dict[str, Any]] = lambda run, inputs: {},
) -> Case:
    """A point of the sweep that the case's name stands for; more: to record, from what was timed and the inputs."""
    name, ours = next((name, ours) for name, ours in case.contenders.items() if name.startswith("ours"))

    def details(run: Any, inputs: Any, seconds: float) -> dict[str, Any]:
        return {"grows": {field: list(allowed) for field, allowed in grows.items()}} | more(run, inputs)

    return dataclasses.replace(
        case,
        name=f"scaling: {case.name}, {x}",
        contenders={name: ours._replace(details=details)},
        group="scaling",
        sweep=(what, x),
        dispatch=None,
        host=False,
    )
