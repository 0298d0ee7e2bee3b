"""The forms in which a right answer comes, and answers that leave something out, from a reference.

`forms` wraps any right answer: other names and another order of the parameters, and what it returns
as lists, tuples, arrays, scalars of NumPy and torch, in float32 and float64, truths as 0 and 1,
words in capitals and with spaces. Each must pass. `ignoring` and `swapping` make answers that do
not look at an argument, or take two for each other. None may pass.
"""

import inspect
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

Answer = Callable[..., Any]


def deep(change: Callable[[Any], Any], container: Callable[[Any], Any] = lambda items: items):
    """Make a change of every number, word and tensor of a result, and of what holds them."""

    def of(value: Any) -> Any:
        if isinstance(value, dict):
            return container({key: of(item) for key, item in value.items()})
        if type(value) in (list, tuple):
            whole = container(value)  # an array of a list of numbers, before they are arrays
            if not isinstance(whole, list | tuple):
                return whole
            return container(type(value)(of(item) for item in value))
        return change(value)

    return of


def only(kind: type | tuple, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: change(value) if type(value) in np.atleast_1d(kind) else value


def whole_tensor(value: Any) -> Any:
    """Make a tensor of a list of numbers; leave alone what is not one."""
    if not isinstance(value, list | tuple) or not {type(item) for item in value} <= {int, float}:
        return value
    return torch.tensor(value, dtype=torch.float64) if value else value


def whole_array(value: Any) -> Any:
    tensor = whole_tensor(value)
    return value if tensor is value else tensor.numpy()


def array(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype != torch.bfloat16:
        return value.detach().numpy()
    kinds = {float: np.float64, int: np.int64, bool: np.bool_, str: np.str_}
    return kinds[type(value)](value) if type(value) in kinds else value


def listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def tupled(value: Any) -> Any:
    return tuple(map(tupled, value)) if isinstance(value, list) else value


def named(value: Any) -> Any:
    """Make a NamedTuple of a tuple, and of a dictionary one that is none of Python's own."""
    if isinstance(value, dict):
        return MappingProxyType(value)
    if not isinstance(value, tuple):
        return value
    return namedtuple("Named", map(str, range(len(value))), rename=True)(*value)


def floating(kind: torch.dtype) -> Callable[[Any], Any]:
    return only(torch.Tensor, lambda x: x.to(kind) if x.is_floating_point() else x)


RESULTS = {
    "lists": deep(only(torch.Tensor, lambda x: x.tolist()), listed),
    "tuples": deep(only(torch.Tensor, lambda x: tupled(x.tolist())), tupled),
    "NumPy": deep(array, whole_array),
    "torch": deep(only((float, int, bool), torch.tensor), whole_tensor),
    "scalars of float32": deep(only(float, np.float32)),
    "floats rounded to float32": deep(only(float, lambda x: float(np.float32(x)))),
    "tensors of float32": deep(floating(torch.float32)),
    "tensors of float64": deep(floating(torch.float64)),
    "0 and 1": deep(only(bool, int)),
    "capitals": deep(only(str, str.upper)),
    "spaces": deep(only(str, lambda x: f" {x} ")),
    "names": deep(lambda x: x, named),
}
TYPED = {"NumPy"}
"""The forms of a result that keep the type of its numbers."""


def forms(reference: Answer, exact_dtype: bool = False) -> Iterator[tuple[str, Answer]]:
    """Yield right answers, each with the name of its form."""
    names = list(inspect.signature(reference).parameters)
    code = "lambda {}: _right({})"  # no name of a parameter
    scope = {"_right": reference}
    renamed = [f"mine_{i}" for i in range(len(names))]
    yield "renamed", eval(code.format(", ".join(renamed), ", ".join(renamed)), scope)
    yield "reordered", eval(code.format(", ".join(reversed(names)), ", ".join(names)), scope)
    yield "any arguments", lambda *arguments: reference(*arguments)
    for name, form in RESULTS.items():
        if name in TYPED or not exact_dtype:
            yield name, lambda *arguments, form=form: form(reference(*arguments))


def ignoring(reference: Answer, cases: Sequence[tuple]) -> Iterator[tuple[str, Answer]]:
    """Yield answers that take one argument for what it is in the first case, or in the last."""
    for i, name in enumerate(list(inspect.signature(reference).parameters)[: len(cases[0])]):
        for place in (0, -1):

            def answer(*arguments: Any, i: int = i, value: Any = cases[place][i]) -> Any:
                return reference(*arguments[:i], value, *arguments[i + 1 :])

            yield f"{name} as in case {place}", answer


def swapping(reference: Answer, cases: Sequence[tuple]) -> Iterator[tuple[str, Answer]]:
    """Yield answers that take two arguments of the same type for each other."""
    names = list(inspect.signature(reference).parameters)
    for i, j in combinations(range(len(cases[0])), 2):
        if type(cases[0][i]) is type(cases[0][j]):

            def answer(*arguments: Any, i: int = i, j: int = j) -> Any:
                swapped = list(arguments)
                swapped[i], swapped[j] = arguments[j], arguments[i]
                return reference(*swapped)

            yield f"{names[i]} and {names[j]}", answer
