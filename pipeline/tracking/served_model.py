"""The classifier as MLflow serves it: base64 images in, class probabilities out.

MLflow stores this file itself ("models from code"), not a pickle of an object.

    curl localhost:5001/invocations -H 'Content-Type: application/json' \\
      -d "{\\"dataframe_records\\": [{\\"image\\": \\"$(base64 -w0 photo.jpg)\\"}]}"
"""

import base64
import io
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

EXPECTED = '{"dataframe_records": [{"image": "<base64>"}, ...]}'
NAMED = 3
"""Number of unreadable images named in the response if no image of a request can be read."""


class Classifier(PythonModel):
    """Predicts images given as base64 text in a column ``image``."""

    def load_context(self, context: Any) -> None:
        """Load the weights that were logged with the model."""
        from unfreeze.evaluation.predictor import Predictor

        self._predictor = Predictor(context.artifacts["weights"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Classify images.

        Args:
            context: not used.
            model_input: a table with a column ``image`` of bytes or of base64 text, which may also be URL-safe, without
                padding, or a data URI. A dictionary with such a column and a list of images also work.
            params: not used.

        Returns:
            A row per image: ``predicted``, ``p_<class>``..., and ``reason``. For an image that cannot be read,
            ``reason`` says why, and the rest is None, as JSON has no NaN; otherwise it is empty.

        Raises:
            MlflowException: there are no images, or none of them can be read; MLflow answers with status 400.
        """
        images = _images(model_input)
        files: dict[int, io.BytesIO] = {}
        reasons: dict[int, str] = {}
        for row, image in enumerate(images):
            try:
                files[row] = io.BytesIO(_content(image))
            except ValueError as error:
                reasons[row] = str(error)
        table = self._predictor.predict(list(files.values())).set_axis(list(files)).reindex(range(len(images)))
        table["reason"] = [reasons.get(row, reason) for row, reason in enumerate(table["reason"])]
        if table["reason"].ne("").all():
            named = [f"image {row}: {reason}" for row, reason in table["reason"].head(NAMED).items()]
            raise _refused(f"None of the images can be read ({'; '.join(named)}).")
        return table.replace({np.nan: None})


def _images(model_input: Any) -> list[Any]:
    """The images of a request, which MLflow passes as a table, a dictionary of columns, or an array."""
    if isinstance(model_input, pd.DataFrame | dict):
        if "image" not in model_input:
            raise _refused(f"There is no column 'image' but {', '.join(map(repr, model_input)) or 'none at all'}.")
        model_input = model_input["image"]
    images = list(np.atleast_1d(model_input)) if isinstance(model_input, np.ndarray | str) else list(model_input)
    if not images:
        raise _refused("There are no images.")
    return images


def _content(image: Any) -> bytes:
    """The bytes of an image. Raises ValueError with a reason of a few words."""
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise ValueError("not base64 text")
    if image[:5].lower() == "data:":
        image = unquote(image.partition(",")[2])
    text = "".join(image.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        raise ValueError("not base64 text") from None


def _refused(sentence: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(f"{sentence} Expected is {EXPECTED}.")


set_model(Classifier())
