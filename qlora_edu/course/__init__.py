"""The classroom: doctor, figures, widgets and exercise checks.

It imports the method (`qlora_edu.codebooks`, `qlora_edu.lora`, ...); the method never imports it.
"""
