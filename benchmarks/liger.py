"""Liger's kernels in a model of transformers, for its own calls alone.

Liger puts its functions into transformers' modules for good. Here they stand there only while its model runs, so that
who is timed beside it runs as transformers has it.
"""

from collections.abc import Callable
from contextlib import ExitStack
from types import ModuleType
from typing import Any
from unittest import mock

from benchmarks.measure import Outputs, Run


def with_liger(apply: Callable[[], Any], modules: tuple[ModuleType, ...], run: Run) -> Run:
    """What is run, with what `apply` changes in the modules until it returns; what it changes in a model stays."""
    before = {module: dict(vars(module)) for module in modules}
    patched: dict[ModuleType, dict[str, Any]] = {}
    try:
        apply()
    finally:
        for module, names in before.items():
            patched[module] = {name: value for name, value in vars(module).items() if value is not names.get(name)}
            for name in patched[module]:
                setattr(module, name, names[name])

    def inside() -> Outputs:
        with ExitStack() as stack:
            for module, values in patched.items():
                if values:
                    stack.enter_context(mock.patch.multiple(module, **values))
            return run()

    return inside
