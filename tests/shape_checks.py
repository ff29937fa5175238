"""Checks of the shapes in core's signatures at runtime, for the tests of core."""

import importlib
import pkgutil
import sys
from contextlib import contextmanager
from types import FunctionType

import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

import imprompt.core


@contextmanager
def checked_shapes():
    """Within the context every function and method of core checks its arguments and its result, wherever it has been imported."""
    with pytest.MonkeyPatch.context() as patch:
        for module in [importlib.import_module(f"imprompt.core.{m.name}") for m in pkgutil.iter_modules(imprompt.core.__path__)]:
            for value in [v for v in vars(module).values() if getattr(v, "__module__", None) == module.__name__]:
                if isinstance(value, FunctionType):
                    replace_everywhere(patch, value, add_check(value))
                elif isinstance(value, type) and not issubclass(value, tuple):
                    for method in [m for m in vars(value).values() if isinstance(m, FunctionType)]:
                        patch.setattr(value, method.__name__, add_check(method))
        yield


def add_check(function):
    return jaxtyped(typechecker=beartype(conf=BeartypeConf(is_pep484_tower=True)))(function)  # an int is a float, as for mypy


def replace_everywhere(patch, function, checked):
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is function:
                patch.setattr(module, name, checked)
