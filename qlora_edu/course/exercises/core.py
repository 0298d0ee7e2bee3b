"""How an answer is checked: against a right one, on inputs that the reader has not seen.

An `Exercise` holds a right answer, inputs, and the wrong answers that people really give, each
under the sentence that says what to rethink. It prints; it never raises, since a notebook must run
to its end whatever the reader wrote.
"""

import inspect
import textwrap
import zlib
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = Sequence[tuple]
Answer = Callable[..., Any]


class Seen(NamedTuple):
    """A wrong answer that shows by a sign in what it returns, and not by being equal to `wrong`."""

    wrong: Answer
    sign: Callable[..., bool]
    """Asked of `(yours)`, or of `(yours, expected, *inputs)` if it takes more."""


@dataclass(frozen=True)
class Verdict:
    """What was found: `mark` is ✓, ✗ or ○, `because` is empty unless it is ✗."""

    mark: str
    text: str
    because: str = ""

    def __str__(self) -> str:
        return f"{self.mark} {self.text}"


@dataclass(frozen=True)
class Exercise:
    """`exercise(answer)` prints the verdict on a function that the reader wrote.

    Attributes:
        title: number and name as the notebook gives them: "1.2 cell edges".
        right: a right answer, as a function; the notebook takes it where later cells need it.
        inputs: tuples of arguments, or a function that makes them from a seeded generator.
        because: what the reader is told, and the wrong answer that deserves it; likeliest first.
        atol: how far a number may be off; 0 asks for the same bits. Say in the chapter why.
        open: whether any answer is right in which no `Seen` of `because` sees its sign.

    >>> double = Exercise(
    ...     "0.0 double",
    ...     lambda x: 2 * x,
    ...     [(3,)],
    ...     because={"x·x is a square, not a double": lambda x: x * x},
    ... )
    >>> double(lambda x: x + x)
    ✓ 0.0 double
    >>> double(lambda x: x**2)
    ✗ 0.0 double
      given     x = 3
      yours     9
      expected  6
      because   x·x is a square, not a double
    """

    title: str
    right: Answer
    inputs: Inputs | Callable[[torch.Generator], Inputs] = ((),)
    because: Mapping[str, Answer | Seen] = None
    atol: float = 0.0
    open: bool = False

    def __call__(self, answer: Answer) -> None:
        """Print the verdict on an answer."""
        print(self.judge(answer))

    def judge(self, answer: Answer) -> Verdict:
        """Return the verdict on an answer; never raises, whatever the answer is."""
        try:
            return self._judge(answer)
        except Exception as error:
            because = f"{type(error).__name__} when your answer was looked at: is it of that kind?"
            return Verdict("✗", f"{self.title}\n  because   {because}", because)

    @cached_property
    def _cases(self) -> Inputs:
        seed = zlib.crc32(self.title.encode())
        made = self.inputs(torch.Generator().manual_seed(seed)) if callable(self.inputs) else None
        return self.inputs if made is None else made

    def _judge(self, answer: Answer) -> Verdict:
        """Compare an answer with the right one, input by input; stop at the first difference."""
        if not callable(answer):
            return self._fail((), show(answer), "a function", "pass the function, not its result")
        for case in self._cases:
            expected = None if self.open else self.right(*deepcopy(case))
            try:
                yours = answer(*deepcopy(case))
            except NotImplementedError:
                return Verdict("○", f"{self.title}: not attempted")
            except (Exception, SystemExit) as error:
                raised = f"raised {type(error).__name__}: {error}"
                because = "your function stopped before it returned an answer"
                return self._fail(case, raised, "" if self.open else show(expected), because)
            if self.open:
                if because := self._explain(answer, case, yours, expected):
                    return self._fail(case, show(yours), "", because)
            elif not same(yours, expected, self.atol):
                because = "your function returned nothing: is there a `return`?"
                if yours is not None:
                    because = self._explain(answer, case, yours, expected)
                    because = because or unlike(yours, expected)
                because = because or "the numbers differ; Hint 1 may help"
                return self._fail(case, *show_both(yours, expected), because)
        return Verdict("✓", self.title)

    def _explain(self, answer: Answer, case: tuple, yours: Any, expected: Any) -> str:
        for because, wrong in self.because.items():
            try:
                if isinstance(wrong, Seen):
                    more = () if len(inspect.signature(wrong.sign).parameters) == 1 else (expected,)
                    found = bool(wrong.sign(yours, *more, *(case if more else ())))
                else:
                    found = all(
                        same(answer(*deepcopy(c)), wrong(*deepcopy(c)), self.atol)
                        for c in self._cases
                    )
            except Exception:  # what cannot be asked of an open answer is a fault of it
                found = self.open
            if found:
                return because
        return ""

    def _fail(self, case: tuple, yours: str, expected: str, because: str) -> Verdict:
        names = inspect.signature(self.right).parameters
        given = ", ".join(f"{name} = {brief(v)}" for name, v in zip(names, case, strict=False))
        rows = {"given": given, "yours": yours, "expected": expected, "because": because}
        lines = [
            textwrap.fill(text, 92, initial_indent=f"  {name:<10}", subsequent_indent=" " * 12)
            for name, text in rows.items()
            if text
        ]
        return Verdict("✗", "\n".join([self.title, *lines]), because)


# --- The first edition's form; goes with the last chapter that uses it. ---

Case = dict[str, Any]  # the arguments of one call, by name


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that people give, and why it is wrong.

    Attributes:
        name: what was done, for example "ties rounded up".
        wrong: a function that does it, with the exercise's signature.
        because: what the reader is told.
        recognise: tells the mistake from `(case, yours, expected)`. Without it, an answer that
            equals `wrong` in every case is taken to have made this mistake.
    """

    name: str
    wrong: Callable[..., Any]
    because: str
    recognise: Callable[[Case, Any, Any], bool] | None = None


@dataclass(frozen=True)
class Check:
    """One exercise: `check(answer)` prints the verdict on a function that the reader wrote.

    Attributes:
        title: number and name as the notebook gives them: "1.2 cell edges".
        reference: the right answer, as a function. The notebook takes it where later cells need it.
        cases: makes the inputs from a seeded generator; an exercise without inputs has one: `{}`.
        mistakes: at least three, most likely first.
        atol: how far a number may be off; 0 asks for the same bits. Say in the chapter why.

    >>> double = Check(
    ...     "0.0 double",
    ...     reference=lambda x: 2 * x,
    ...     cases=lambda random: [{"x": 3}],
    ...     mistakes=(Mistake("squared", lambda x: x * x, "x·x is a square, not a double"),),
    ... )
    >>> double(lambda x: x + x)
    ✓ 0.0 double
    >>> double(lambda x: x**2)
    ✗ 0.0 double
      given     x = 3
      yours     9
      expected  6
      because   x·x is a square, not a double
    """

    title: str
    reference: Callable[..., Any]
    mistakes: Sequence[Mistake]
    cases: Callable[[torch.Generator], Sequence[Case]] = lambda random: [{}]
    atol: float = 0.0

    def __call__(self, answer: Callable[..., Any]) -> None:
        """Print the verdict on an answer."""
        print(self.judge(answer))

    def judge(self, answer: Callable[..., Any]) -> Verdict:
        """Return the verdict on an answer; never raises, whatever the answer is."""
        try:
            return self._judge(answer)
        except Exception as error:
            because = f"{type(error).__name__} when your answer was looked at: is it of that kind?"
            return Verdict("✗", f"{self.title}\n  because   {because}", because)

    def _judge(self, answer: Callable[..., Any]) -> Verdict:
        """Compare an answer with the reference, case by case; stop at the first difference."""
        if not callable(answer):
            return self._fail({}, show(answer), "a function", "pass the function, not its result")
        cases = self.cases(torch.Generator().manual_seed(zlib.crc32(self.title.encode())))
        for case in cases:
            expected = self.reference(**deepcopy(case))
            try:
                yours = answer(**deepcopy(case))
            except NotImplementedError:
                return Verdict("○", f"{self.title}: not attempted")
            except (Exception, SystemExit) as error:
                return self._fail(
                    case,
                    f"raised {type(error).__name__}: {error}",
                    show(expected),
                    "your function stopped before it returned an answer",
                )
            if not same(yours, expected, self.atol):
                because = self._explain(answer, cases, case, yours, expected)
                return self._fail(case, *show_both(yours, expected), because)
        return Verdict("✓", self.title)

    def _explain(
        self,
        answer: Callable[..., Any],
        cases: Sequence[Case],
        case: Case,
        yours: Any,
        expected: Any,
    ) -> str:
        if yours is None:
            return "your function returned nothing: is there a `return`?"
        for mistake in self.mistakes:
            if mistake.recognise is None:
                found = self._behaves_like(answer, mistake.wrong, cases)
            else:
                found = _quietly(mistake.recognise, case, yours, expected)
            if found is not None and found:
                return mistake.because
        return unlike(yours, expected) or "the numbers differ; Hint 1 may help"

    def _behaves_like(self, answer: Callable, wrong: Callable, cases: Sequence[Case]) -> bool:
        return all(
            same(_quietly(answer, **deepcopy(case)), wrong(**deepcopy(case)), self.atol)
            for case in cases
        )

    def _fail(self, case: Case, yours: str, expected: str, because: str) -> Verdict:
        given = ", ".join(f"{name} = {brief(value)}" for name, value in case.items())
        rows = {"given": given, "yours": yours, "expected": expected, "because": because}
        lines = [
            textwrap.fill(text, 92, initial_indent=f"  {name:<10}", subsequent_indent=" " * 12)
            for name, text in rows.items()
            if text
        ]
        return Verdict("✗", "\n".join([self.title, *lines]), because)


@dataclass(frozen=True)
class OpenCheck(Check):
    """An exercise with many right answers: right is what no mistake's `recognise` finds fault with.

    The exercise takes no arguments. A question that cannot even be asked of an answer counts as a
    fault found.

    >>> even = OpenCheck(
    ...     "0.0 an even number",
    ...     reference=lambda: 2,
    ...     mistakes=(Mistake("odd", lambda: 3, "it is odd", lambda case, n, _: n % 2 == 1),),
    ... )
    >>> even(lambda: 10)
    ✓ 0.0 an even number
    >>> even(lambda: "ten")
    ✗ 0.0 an even number
      yours     'ten'
      because   it is odd
    """

    def _judge(self, answer: Callable[..., Any]) -> Verdict:
        """Look for each fault in turn; `recognise` gets the answer as its second argument."""
        if not callable(answer):
            return self._fail({}, show(answer), "a function", "pass the function, not its result")
        try:
            yours = answer()
        except NotImplementedError:
            return Verdict("○", f"{self.title}: not attempted")
        except (Exception, SystemExit) as error:
            because = "your function stopped before it returned an answer"
            return self._fail({}, f"raised {type(error).__name__}: {error}", "", because)
        for mistake in self.mistakes:
            try:
                found = mistake.recognise({}, yours, None)
            except Exception:
                found = True
            if found:
                return self._fail({}, show(yours), "", mistake.because)
        return Verdict("✓", self.title)


def _quietly(function: Callable, *arguments: Any, **keywords: Any) -> Any:
    """Call a function on what a reader made of it: an exception counts as no answer."""
    try:
        return function(*arguments, **keywords)
    except Exception:
        return None


def same(yours: Any, expected: Any, atol: float = 0.0) -> bool:
    """Compare two answers: numbers within `atol`, tensors by shape too, containers item by item.

    A list, a tuple, an array and a tensor of the same numbers are the same answer. A NaN equals
    nothing, as always.

    >>> same([1, 2.0], torch.tensor([1.0, 2.0])), same(0.1 + 0.2, 0.3), same("NF4", "nf4")
    (True, False, False)
    """
    if isinstance(expected, dict):
        return (
            isinstance(yours, dict)
            and yours.keys() == expected.keys()
            and all(same(yours[key], value, atol) for key, value in expected.items())
        )
    if isinstance(expected, str | bool | None):
        return type(yours) is type(expected) and yours == expected
    numbers, wanted = as_numbers(yours), as_numbers(expected)
    if wanted is not None:
        if numbers is None or numbers.shape != wanted.shape:
            return False
        return bool(((numbers == wanted) | ((numbers - wanted).abs() <= atol)).all())
    if isinstance(expected, list | tuple):
        return (
            isinstance(yours, list | tuple)
            and len(yours) == len(expected)
            and all(same(a, b, atol) for a, b in zip(yours, expected, strict=True))
        )
    return type(yours) is type(expected) and bool(yours == expected)


def as_numbers(value: Any) -> Tensor | None:
    """Turn numbers of any kind into a float64 tensor; None if they are not numbers.

    >>> as_numbers([1, 2]), as_numbers("two") is None
    (tensor([1., 2.], dtype=torch.float64), True)
    """
    if isinstance(value, str | bool | dict | None):
        return None
    try:
        return torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        return None


def unlike(yours: Any, expected: Any) -> str:
    """Say in what kind, shape or finiteness two answers differ; empty if only in their values."""
    numbers, wanted = as_numbers(yours), as_numbers(expected)
    if wanted is None or numbers is None:
        kinds = type(yours).__name__, type(expected).__name__
        return "" if kinds[0] == kinds[1] else f"yours is of type {kinds[0]}, not {kinds[1]}"
    if numbers.shape != wanted.shape:
        return f"the shape is {tuple(numbers.shape)}, it should be {tuple(wanted.shape)}"
    if wanted.isfinite().all() and not numbers.isfinite().all():
        return "there is a NaN or an infinity in it"
    return ""


def show(value: Any, start: int = 0) -> str:
    """Write a value in a line: short tensors whole, long ones by shape and four entries.

    >>> show(torch.tensor([0.5, -1.0])), show(torch.zeros(3, 4))
    ('[0.5, -1]', '(3, 4) numbers, [0:4] = [0, 0, 0, 0]')
    """
    numbers = as_numbers(value)
    if numbers is None:
        text = repr(value)
        return text if len(text) <= 300 else f"{text[:297]}..."
    if numbers.dim() == 0:
        return f"{numbers.item():.9g}"
    flat = [f"{number:.9g}" for number in numbers.flatten()[start : start + 4].tolist()]
    if numbers.dim() == 1 and len(numbers) <= 5:
        return f"[{', '.join(f'{number:.9g}' for number in numbers.tolist())}]"
    shape = len(numbers) if numbers.dim() == 1 else tuple(numbers.shape)
    return f"{shape} numbers, [{start}:{start + len(flat)}] = [{', '.join(flat)}]"


def brief(value: Any) -> str:
    """Write an argument: in full if it is short, otherwise what it is.

    >>> brief(torch.zeros(8, 64)), brief({"nf4": torch.zeros(16)})
    ('8 × 64 numbers', "one each for 'nf4'")
    """
    if isinstance(value, dict):
        return "one each for " + ", ".join(map(repr, value))
    if isinstance(value, Tensor) and value.numel() > 5:
        return " × ".join(map(str, value.shape)) + " numbers"
    return show(value)


def show_both(yours: Any, expected: Any) -> tuple[str, str]:
    """Write two answers, long ones from the first place where they differ."""
    numbers, wanted = as_numbers(yours), as_numbers(expected)
    start = 0
    if numbers is not None and wanted is not None and numbers.shape == wanted.shape:
        differing = (numbers != wanted).flatten().nonzero()
        start = int(differing[0]) if len(differing) else 0
    return show(yours, start), show(expected, start)
