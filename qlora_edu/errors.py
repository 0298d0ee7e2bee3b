"""Every error of this course: one base, and a short family under it.

``except QloraError`` catches whatever the course refuses to do. Each message names what was wrong
and says what to do next. The second base is the built-in error that fits, so that code which knows
nothing of this course may catch that one.
"""


class QloraError(Exception):
    """The base of all errors of this course."""


class QuantizationError(QloraError, ValueError):
    """The base of every error that quantisation raises."""


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
    """The run folder is already there, and nothing overwrites it."""


class UnknownAdapterError(QloraError, KeyError):
    """No adapter of that name is here; the message says which are."""

    def __str__(self) -> str:
        return str(self.args[0])


class ModelUnavailableError(QloraError, OSError):
    """The base model is neither in a local folder nor to be had from the Hub."""


class CheckpointError(QloraError, RuntimeError):
    """A checkpoint cannot be written, read or used; the message says which, and what to do."""


class NotReadyError(QloraError, RuntimeError):
    """This machine cannot run the course as it is; the message lists every fault and its fix."""
