"""Every error of this course: one base, and a short family under it.

The second base of each is the built-in error that fits, for code that knows nothing of this course.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any


class QloraError(Exception):
    """The base of all errors of this course."""


class QuantizationError(QloraError, ValueError):
    """A weight, a codebook or a block size cannot be used."""


class LoRAError(QloraError, ValueError):
    """An adapter was asked for, loaded or merged in a way that cannot work."""


class PlanError(QloraError, ValueError):
    """A step cannot be planned; the message names the setting, or what the model does."""


class DoesNotFitError(QloraError, MemoryError):
    """A step would need more memory than there is."""


class PagingError(QloraError, ValueError):
    """The paged optimizer cannot be made, run or loaded as asked; nothing has been changed."""


class DataError(QloraError, ValueError):
    """A data set cannot be used; the message names the file and line, and says what to do."""


class GenerationError(QloraError, ValueError):
    """A setting or a prompt that nothing can be generated from; the message says what to do."""


class TrainingError(QloraError, RuntimeError):
    """Training or measuring cannot go on; the message says what was found."""


class EvaluationError(QloraError, ValueError):
    """The answers, a verdict or the games cannot be used; the message says which and why."""


class ConfigError(QloraError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class RunExistsError(QloraError, FileExistsError):
    """The folder to be written is already there, and nothing overwrites it."""


class ModelUnavailableError(QloraError, OSError):
    """The base model is neither in a local folder nor to be had from the Hub."""


class CheckpointError(QloraError, RuntimeError):
    """A checkpoint cannot be written or used; the message says which, and what to do."""


class DamagedFileError(CheckpointError):
    """A file is missing, or is not what the manifest says."""


class NotReadyError(QloraError, RuntimeError):
    """This machine cannot run the course as it is; the message lists every fault and its fix."""


def did_you_mean(name: Any, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest that there is, or all of them."""
    names = list(names)
    near = get_close_matches(str(name), names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"


@contextmanager
def reading(path: str | Path, error: type[QloraError], advice: str) -> Iterator[None]:
    """Raise whatever goes wrong while a file is read and parsed as `error`, with the file's name.

    An error of the course passes as it is: it says more. `advice` says what to do next.
    """
    try:
        yield
    except QloraError:
        raise
    except Exception as fault:
        what = " ".join(str(fault).split()) or type(fault).__name__
        raise error(f"cannot read {path} ({what}); {advice}") from fault
