"""The classroom: doctor, figures, widgets and exercise checks.

It imports the method (`qlora_edu.codebooks`, `qlora_edu.lora`, ...); the method never imports it.
"""

from qlora_edu.course.progress import progress

__all__ = ["progress"]
