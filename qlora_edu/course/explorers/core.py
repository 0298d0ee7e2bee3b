"""Sliders that move a picture.

Each picture is made by a pure function, `render_*(**parameters) -> bytes`: the same parameters give
the same PNG, with or without a notebook. If drawing fails, the error is written where the picture
was: a widget that fails in silence teaches nothing.
"""

import html
from collections.abc import Callable

from ipywidgets import HTML, Box, Image, VBox, Widget


class Explorer(VBox):
    """Controls above a picture, which is drawn again whenever a control moves.

    Args:
        render: pure; takes the value of every control by name and returns PNG bytes.
        controls: ipywidgets with a `value`, by the name of the parameter they set.

    >>> from ipywidgets import IntSlider
    >>> def render(n):
    ...     return b"PNG" * (6 // n)
    >>> explorer = Explorer(render, n=IntSlider(1, min=0, max=3))
    >>> explorer.controls["n"].value = 2
    >>> bytes(explorer.picture.value)
    b'PNGPNGPNG'
    >>> explorer.controls["n"].value = 0
    >>> explorer.message.value
    '<b>ZeroDivisionError</b>: integer division or modulo by zero'
    """

    def __init__(self, render: Callable[..., bytes], **controls: Widget) -> None:
        self.render = render
        self.controls = controls
        self.picture = Image(format="png")
        self.message = HTML()
        for control in controls.values():
            # A drag would queue dozens of pictures; draw when the slider comes to rest.
            if control.has_trait("continuous_update"):
                control.continuous_update = False
            control.observe(self.draw, names="value")
        row = Box(list(controls.values()), layout={"flex_flow": "row wrap"})
        super().__init__([row, self.message, self.picture])
        self.draw()

    @property
    def parameters(self) -> dict[str, object]:
        """The values of the controls now, by name."""
        return {name: control.value for name, control in self.controls.items()}

    def draw(self, change: object = None) -> None:
        """Draw the picture for the controls as they are; on an error, say which."""
        try:
            png, message = self.render(**self.parameters), ""
        except Exception as error:
            png, message = b"", f"<b>{type(error).__name__}</b>: {html.escape(str(error))}"
        self.picture.value, self.message.value = png, message
