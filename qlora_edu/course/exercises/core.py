"""How an answer is checked: against a right one, on inputs that the reader has not seen.

An `Exercise` holds a right answer, inputs, and the wrong answers that people really give, each
under the sentence that says what to rethink. Called, it prints; it never raises, since a notebook
must run to its end whatever the reader wrote. `same` says which forms of an answer are one answer.
"""

import functools
import inspect
import itertools
import linecache
import textwrap
import zlib
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qlora_edu.course.progress import record

Inputs = Sequence[tuple]
Answer = Callable[..., Any]

FLOAT32_ROUNDING = 2**-21
"""What an answer computed in float32 may be off by, of its size: four steps of the last bit."""


class Seen(NamedTuple):
    """A wrong answer that shows by a sign in what it returns, and not by being equal to `wrong`."""

    wrong: Answer
    sign: Callable[..., bool]
    """Asked of `(yours)`, or of `(yours, expected, *inputs)` if it takes more."""


@dataclass(frozen=True)
class Verdict:
    """What was found: `mark` is ✓, ✗ or ○; the other fields are words, or empty."""

    mark: str
    title: str
    given: str = ""
    yours: str = ""
    expected: str = ""
    score: str = ""
    because: str = ""

    def __str__(self) -> str:
        names = ("given", "yours", "expected", "score", "because")
        layout = {"width": 92, "subsequent_indent": " " * 12, "break_on_hyphens": False}
        rows = [
            textwrap.fill(text, initial_indent=f"  {name:<10}", **layout)
            for name in names
            if (text := getattr(self, name))
        ]
        return "\n".join([f"{self.mark} {self.title}", *rows])


@dataclass(eq=False)
class Exercise:
    """`exercise(answer)` prints the verdict on a function that the reader wrote.

    Attributes:
        title: number and name as the notebook gives them: "1.2 cell edges".
        reference: a right answer, as a function with the parameters of the stub.
        inputs: tuples of arguments, or a function that makes them from a seeded generator.
        because: what the reader is told, and the wrong answer that deserves it; likeliest first.
        atol: how far a number may be off; 0 asks for the same bits. Say in the chapter why.
        open: whether any answer is right in which no `Seen` of `because` sees its sign. The signs
            see the answer in the form of the reference's: a list of numbers as a tensor.
        score: for an open exercise, makes the words of its score from the answer to each case.
        exact_dtype: whether the numbers must also be of the reference's type (say so in the text).

    >>> double = Exercise(
    ...     "0.0 double",
    ...     lambda x: 2 * x,
    ...     [(3,)],
    ...     because={"x·x is a square, not a double": lambda x: x * x},
    ... )
    >>> double.judge(lambda n: n + n).mark
    '✓'
    >>> print(double.judge(lambda x: x**2))
    ✗ 0.0 double
      given     x = 3
      yours     9
      expected  6
      because   x·x is a square, not a double
    """

    title: str
    reference: Answer
    inputs: Inputs | Callable[[torch.Generator], Inputs] = ((),)
    because: Mapping[str, Answer | Seen] = field(default_factory=dict)
    atol: float = 0.0
    open: bool = False
    score: Callable[..., str] | None = None
    exact_dtype: bool = False
    _own: Answer | None = field(default=None, init=False, repr=False)

    @property
    def number(self) -> str:
        """The number of the exercise, for example "1.2"."""
        return self.title.split()[0]

    @cached_property
    def _cases(self) -> Inputs:
        seed = zlib.crc32(self.title.encode())
        made = self.inputs(torch.Generator().manual_seed(seed)) if callable(self.inputs) else None
        return tuple(self.inputs if made is None else made)

    @cached_property
    def _right(self) -> tuple:
        return tuple(self.reference(*case) for case in self.cases())

    def cases(self) -> Inputs:
        """The tuples of arguments that an answer is tried on, as copies; always the same."""
        return deepcopy(self._cases)

    def __call__(self, answer: Answer | str) -> None:
        """Print the verdict on an answer, or on the caller's function of that name; keep a pass."""
        self._own = None
        if isinstance(answer, str):
            here = inspect.currentframe().f_back.f_globals
            if answer not in here:
                because = (
                    f"there is no function `{answer}` here; run the cell above, and keep the name "
                    "of the stub"
                )
                print(Verdict("✗", self.title, because=because))
                return
            answer = here[answer]
        if answer is self.reference:
            print(f"○ {self.title} (this is the course's version; to check yours, run its cell)")
            return
        verdict = self.judge(answer)
        print(verdict)
        if verdict.mark == "✓":
            self._own = answer
            record(self.number)

    @property
    def answer(self) -> Answer:
        """The reader's own function if it passed its last check here, else the reference.

        A passed answer may have other parameter names and may return a list for a tensor. Later
        cells need not care: it takes the reference's arguments and returns the reference's kind.
        """
        own = self._own
        if own is None:
            return self.reference
        model = self._right[0]

        @functools.wraps(own)
        def answer(*arguments: Any, **named: Any) -> Any:
            bound = inspect.signature(self.reference).bind(*arguments, **named)
            bound.apply_defaults()
            return alike(self._ask(own, bound.args), model)

        return answer

    def judge(self, answer: Answer) -> Verdict:
        """Return the verdict on an answer; never raises, whatever the answer is."""
        try:
            with torch.random.fork_rng(devices=[]):  # an answer may draw; the reader's cells go on
                return self._judge(answer)
        except Exception as error:
            because = f"your answer cannot be compared with the right one ({type(error).__name__})"
            return Verdict("✗", self.title, because=because)

    def _judge(self, answer: Answer) -> Verdict:
        """Compare an answer with the right one, input by input; stop at the first difference."""
        if not callable(answer):
            return self._fail((), show(answer), "a function", "pass the function, not its result")
        if because := self._misfit(answer):
            return self._fail((), "", "", because)
        given = []
        for case, expected in zip(self._cases, self._right, strict=True):
            shown = "" if self.open else show(expected)
            try:
                yours = self._ask(answer, case)
            except (Exception, SystemExit) as error:
                if type(error) is NotImplementedError and not error.args:
                    return Verdict("○", f"{self.title} (not attempted)")
                because = "" if self.open else self._explain(answer, case, error, expected)
                because = because or "your function stopped before it returned; Hint 1 may help"
                return self._fail(case, raised(error, answer), shown, because)
            if yours is None and expected is not None:
                because = self._explain(answer, case, yours, expected)
                because = because or "your function returned nothing: is there a `return`?"
                return self._fail(case, "None", shown, because)
            if self.open:
                given.append(yours := alike(yours, expected))
                if because := not_finite(yours) or self._explain(answer, case, yours, expected):
                    return self._fail(case, show(yours), "", because, self._score(given))
            elif not same(yours, expected, self.atol):
                because = self._explain(answer, case, alike(yours, expected), expected)
                because = because or unlike(yours, expected, self.atol)
                because = because or "that is not the right value; Hint 1 may help"
                return self._fail(case, *show_both(yours, expected, self.atol), because)
        if self.exact_dtype and dtype(yours) != dtype(expected):
            because = f"the values are right, their type is not: {dtype(expected)} is asked for"
            return self._fail(case, dtype(yours), dtype(expected), because)
        tried = f" ({len(self._cases)} cases)" if len(self._cases) > 1 else ""
        return Verdict("✓", self.title + tried, score=self._score(given))

    def _ask(self, answer: Answer, case: tuple) -> Any:
        """Call by position: names are the reader's own; by name where only the order is another."""
        names, theirs = parameters(self.reference), parameters(answer)
        if theirs != names and sorted(theirs) == sorted(names):
            return answer(**dict(zip(names, deepcopy(case), strict=False)))
        return answer(*deepcopy(case))

    def _misfit(self, answer: Answer) -> str:
        """Say that a function does not take the arguments of the stub; empty if it does."""
        try:
            signature = inspect.signature(answer)
            signature.bind(*self._cases[0])
        except TypeError:
            names = ", ".join(parameters(self.reference))
            return f"it takes {signature}, not ({names}): keep the argument names of the stub"
        except ValueError:  # a built-in function that does not tell
            pass
        return ""

    def _explain(self, answer: Answer, case: tuple, yours: Any, expected: Any) -> str:
        """Find the first wrong answer that this one is; empty if it is none of them."""
        theirs = functools.cache(lambda i: attempt(self._ask, answer, self._cases[i]))
        for because, wrong in self.because.items():
            try:
                if not isinstance(wrong, Seen):
                    found = self._behaves_like(theirs, wrong)
                elif isinstance(yours, BaseException):
                    found = False
                else:
                    more = () if len(parameters(wrong.sign)) == 1 else (expected, *deepcopy(case))
                    found = bool(wrong.sign(yours, *more))
            except Exception:  # what cannot be asked of an open answer is a fault of it
                found = self.open and isinstance(wrong, Seen) and yours is not None
            if found:
                return because
        return ""

    def _behaves_like(self, theirs: Callable[[int], Any], wrong: Answer) -> bool:
        """Whether an answer returns what `wrong` does, and stops where it stops."""
        returned = False
        for i, case in enumerate(self.cases()):
            yours, its = theirs(i), attempt(wrong, *case)
            stops = isinstance(yours, BaseException) or isinstance(its, BaseException)
            if not (type(yours) is type(its) if stops else same(yours, its, self.atol)):
                return False
            returned = returned or not stops
        return returned  # two answers that only ever stop may do so for different reasons

    def _score(self, given: list) -> str:
        try:
            return str(self.score(*given))
        except Exception:  # no score, or an answer that cannot have one
            return ""

    def _fail(
        self, case: tuple, yours: str, expected: str, because: str, score: str = ""
    ) -> Verdict:
        named = zip(parameters(self.reference), case, strict=False)
        given = ", ".join(f"{name} = {show(value, longest=160)}" for name, value in named)
        return Verdict("✗", self.title, given, yours, expected, score, because)


def parameters(function: Answer) -> list[str]:
    """The names of a function's parameters; none if it does not tell."""
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def attempt(function: Answer, *arguments: Any) -> Any:
    """What a function returns, or the exception that it raises."""
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        return error


def faults_left(broken: Answer, **told: str) -> dict[str, Answer]:
    """The part of `because` about a function to repair: any of its faults may be left.

    `broken` has a keyword for each fault; `told` says what the reader is told of it.

    >>> list(faults_left(print, end="it ends early", sep="it runs together"))[-1]
    'it ends early; and it runs together'
    """
    sets = itertools.chain(*(itertools.combinations(told, n + 1) for n in range(len(told))))
    return {
        "; and ".join(told[name] for name in names): functools.partial(
            broken, **dict.fromkeys(names, True)
        )
        for names in sets
    }


def chose(reference: Answer, situation: str, *answers: str) -> Seen:
    """The wrong choice of one of `answers` in a situation, where a dictionary of choices is asked.

    >>> chose(lambda: {"a": "yes", "b": "no"}, "b", "yes").wrong()
    {'a': 'yes', 'b': 'yes'}
    """
    return Seen(
        lambda: {**reference(), situation: answers[0]}, lambda given: given[situation] in answers
    )


def raised(error: BaseException, answer: Answer) -> str:
    """Say what an answer raised, and in which line of the reader's own code."""
    code = getattr(inspect.unwrap(answer), "__code__", None)
    line, trace = "", error.__traceback__
    while trace is not None:
        if code is not None and trace.tb_frame.f_code.co_filename == code.co_filename:
            text = linecache.getline(code.co_filename, trace.tb_lineno).strip()
            line = f", in line {trace.tb_lineno}" + (f": {text}" if text else "")
        trace = trace.tb_next
    return f"raised {type(error).__name__}: {error}{line}"


# --- Which forms of an answer are the same answer ---


def same(yours: Any, expected: Any, atol: float = 0.0) -> bool:
    """Compare two answers: numbers within `atol`, tensors by shape too, containers item by item.

    A list, a tuple, an array and a tensor of the same numbers are the same answer; so are 1 and
    True where a truth is asked for, and words in capitals or with spaces around. Where Python's
    float is expected, to a tolerance, float32's own rounding is forgiven. A NaN equals nothing.

    >>> same([1, 2.0], torch.tensor([1.0, 2.0])), same(0.1 + 0.2, 0.3), same(" NF4", "nf4")
    (True, False, True)
    """
    if isinstance(expected, bool):
        number = _as_tensor(yours)
        return number is not None and number.dim() == 0 and number.item() == expected
    if isinstance(expected, str):
        return isinstance(yours := plain(yours), str) and _folded(yours) == _folded(expected)
    if isinstance(expected, Mapping):
        return (
            isinstance(yours, Mapping)
            and yours.keys() == expected.keys()
            and all(same(yours[key], value, atol) for key, value in expected.items())
        )
    if as_numbers(expected) is not None:
        return (right := _right(yours, expected, atol)) is not None and bool(right.all())
    if isinstance(expected, list | tuple):
        yours = plain(yours)
        return (
            isinstance(yours, list | tuple)
            and len(yours) == len(expected)
            and all(same(a, b, atol) for a, b in zip(yours, expected, strict=True))
        )
    return type(yours) is type(expected) and bool(yours == expected)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _right(yours: Any, expected: Any, atol: float) -> Tensor | None:
    """Which numbers of an answer are right; None if it is not numbers of that shape."""
    numbers, wanted = as_numbers(yours), as_numbers(expected)
    if numbers is None or wanted is None or numbers.shape != wanted.shape:
        return None
    off, slack = (numbers - wanted).abs(), torch.full_like(wanted, atol)
    right, single = numbers == wanted, dtype(yours) == "float32"
    if isinstance(expected, int):
        right |= (numbers == wanted.float()) & single
    elif dtype(expected) != "float32" and (atol or single):
        slack += FLOAT32_ROUNDING * wanted.abs()
    right |= wanted.isfinite() & (off <= slack)
    return right


def as_numbers(value: Any) -> Tensor | None:
    """Turn numbers of any kind into a float64 tensor; None if they are not numbers.

    >>> as_numbers([1, 2]), as_numbers("two") is None, as_numbers(True) is None
    (tensor([1., 2.], dtype=torch.float64), True, True)
    """
    return None if isinstance(value, bool | np.bool_) else _as_tensor(value)


def _as_tensor(value: Any) -> Tensor | None:
    try:
        if isinstance(value, Tensor):
            return value.detach().cpu().to(torch.float64)
        if isinstance(value, np.ndarray | np.generic):
            return torch.from_numpy(np.array(value, dtype=np.float64))
        if isinstance(value, list | tuple):
            parts = [_as_tensor(item) for item in value]
            return torch.stack(parts) if parts else torch.zeros(0, dtype=torch.float64)
        if isinstance(value, str | bytes | None) or not hasattr(value, "__float__"):
            return None
        return torch.tensor(float(value), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def plain(value: Any) -> Any:
    """An array or a scalar of NumPy as what Python has for it; anything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def dtype(value: Any) -> str:
    """The type of an answer's numbers: "uint8" for a tensor or an array, "list" for a list."""
    kind = getattr(value, "dtype", type(value).__name__)
    return str(kind).removeprefix("torch.")


def alike(yours: Any, model: Any) -> Any:
    """Give an answer the form of `model`: a list of numbers as a tensor, 128.0 as 128.

    What cannot be had in that form without loss stays as it is.

    >>> alike([1, 2], torch.zeros(1)), alike(128.0, 64), alike(["a", 1.0], ("b", 2))
    (tensor([1., 2.]), 128, ('a', 1))
    """
    yours, number = plain(yours) if not isinstance(model, Tensor) else yours, as_numbers(yours)
    if isinstance(model, bool):
        return bool(yours) if same(yours, True) or same(yours, False) else yours
    if isinstance(model, str):
        folds = isinstance(yours, str) and model == _folded(model)
        return _folded(yours) if folds else yours
    if isinstance(model, int | float) and number is not None and number.dim() == 0:
        exact = isinstance(model, float) or number.item().is_integer()
        return type(model)(number.item()) if exact else yours
    if isinstance(model, Tensor) and number is not None:
        if isinstance(yours, Tensor) and yours.dtype == model.dtype:
            return yours
        cast = number.to(model.dtype)
        return cast if model.is_floating_point() or bool((cast == number).all()) else yours
    if isinstance(model, Mapping) and isinstance(yours, Mapping):
        return {key: alike(value, model.get(key)) for key, value in yours.items()}
    if isinstance(model, list | tuple) and isinstance(yours, list | tuple | Tensor) and model:
        items = yours.tolist() if isinstance(yours, Tensor) else yours
        models = model if len(model) == len(items) else [model[0]] * len(items)
        made = [alike(item, one) for item, one in zip(items, models, strict=True)]
        return type(model)(*made) if hasattr(model, "_fields") else type(model)(made)
    return yours


# --- What is said about two answers ---


def unlike(yours: Any, expected: Any, atol: float = 0.0) -> str:
    """Say what is known of the difference of two answers; empty if only that there is one.

    >>> unlike([1, 9, 3, 9], torch.tensor([1, 2, 3, 4])), unlike((1, "b"), (1, "a"))
    ('2 of 4 are wrong, the first at index [1]', '1 of 2 are wrong, the first at index [1]')
    """
    yours, numbers, wanted = plain(yours), as_numbers(yours), as_numbers(expected)
    if isinstance(expected, Mapping) and isinstance(yours, Mapping):
        if keys := [key for key in (*expected, *yours) if key not in yours or key not in expected]:
            return "the keys differ: " + ", ".join(map(repr, keys))
        wrong = [repr(key) for key in expected if not same(yours[key], expected[key], atol)]
        return f"wrong under {' and '.join(wrong)}"
    if numbers is not None and wanted is not None:
        if numbers.shape != wanted.shape:
            return f"the shape is {tuple(numbers.shape)}, it should be {tuple(wanted.shape)}"
        if wanted.isfinite().all() and (because := not_finite(yours)):
            return because
        right = _right(yours, expected, atol)
        wrong = (~right).nonzero().tolist()
        return _first_of(wrong, right.numel()) if right.any() else ""
    if isinstance(yours, list | tuple) and isinstance(expected, list | tuple):
        if len(yours) != len(expected):
            return f"there are {len(yours)} items, it should be {len(expected)}"
        pairs = enumerate(zip(yours, expected, strict=True))
        return _first_of([[i] for i, pair in pairs if not same(*pair, atol)], len(yours))
    kinds = type(yours).__name__, type(expected).__name__
    return "" if kinds[0] == kinds[1] else f"yours is of type {kinds[0]}, not {kinds[1]}"


def _first_of(wrong: list[list[int]], count: int) -> str:
    return f"{len(wrong)} of {count} are wrong, the first at index {wrong[0]}"


def not_finite(value: Any) -> str:
    """Say that there is a NaN or an infinity in an answer; empty if there is none."""
    numbers = as_numbers(value)
    if numbers is None and isinstance(value, list | tuple | Mapping):
        items = value.values() if isinstance(value, Mapping) else value
        return next(filter(None, map(not_finite, items)), "")
    finite = numbers is None or bool(numbers.isfinite().all())
    return "" if finite else "there is a NaN or an infinity in it"


def show(value: Any, start: int = 0, digits: int = 6, longest: int = 400) -> str:
    """Write a value in a line: up to sixteen numbers whole, more by shape and four entries.

    >>> show(torch.tensor([0.9, -1.0])), show([(640, 256), (128, 256)]), show(torch.zeros(9, 4))
    ('[0.9, -1]', '[(640, 256), (128, 256)]', '(9, 4) numbers, [0:4] = [0, 0, 0, 0]')
    """
    numbers = as_numbers(value)
    if numbers is None or numbers.numel() <= 16:
        text = _written(value, digits)
        return text if len(text) <= longest else f"{text[: longest - 3]}..."
    shape = len(numbers) if numbers.dim() == 1 else tuple(numbers.shape)
    whole = value if isinstance(value, Tensor | np.ndarray) else numbers
    flat = whole.reshape(-1)[start : start + 4]
    return f"{shape} numbers, [{start}:{start + len(flat)}] = {_written(flat, digits)}"


def _written(value: Any, digits: int) -> str:
    """Write numbers to so many digits wherever they are; whole numbers in full."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        if value.reshape(-1).shape[0] > 16:
            return show(value, 0, digits)
        value = value.tolist()
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, dict):
        items = (f"{key!r}: {_written(item, digits)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, list | tuple):
        text = ", ".join(_written(item, digits) for item in value)
        comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
        return f"[{text}]" if isinstance(value, list) else f"({text}{comma})"
    return repr(value)


def show_both(yours: Any, expected: Any, atol: float = 0.0) -> tuple[str, str]:
    """Write two answers, long ones from the first place where they differ, until they do."""
    right = _right(yours, expected, atol)
    start = 0 if right is None else int((~right).flatten().nonzero()[0])
    for digits in (6, 9, 17):
        both = show(yours, start, digits), show(expected, start, digits)
        if both[0] != both[1]:
            break
    return both
