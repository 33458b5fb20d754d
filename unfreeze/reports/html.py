"""Render a report: one self-contained HTML page, without scripts or network access.

The templates escape every text, because file names, class names and reasons come from outside.
"""

import base64
import io
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from unfreeze.reports.plots import to_data_uri

MANY_ROWS = 20
"""A table with more rows is folded."""


def render(template: str, **values: Any) -> str:
    """The page of a template in `unfreeze/reports/templates`, filled with values."""
    environment = Environment(
        loader=PackageLoader("unfreeze.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.do"],
    )
    environment.globals["many_rows"] = MANY_ROWS
    environment.filters |= {"image_uri": image_uri, "figure_uri": to_data_uri}
    return environment.get_template(template).render(values)


def image_uri(pixels: NDArray[np.uint8]) -> str:
    """An image (H, W, 3) as a small JPEG data URI."""
    image = Image.fromarray(np.asarray(pixels))
    image.thumbnail((300, 150))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
