"""The classroom: doctor, figures, widgets and exercise checks.

It imports the method (`qlora_edu.codebooks`, `qlora_edu.lora`, ...); the method never imports it.
"""


def progress() -> None:
    """Print which exercises are solved, chapter by chapter; recorded on this machine alone."""
    from qlora_edu.course import passed

    passed.show()
