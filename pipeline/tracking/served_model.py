"""The classifier as MLflow serves it: base64 images in, class probabilities out.

MLflow stores this file itself ("models from code"), not a pickle of an object.

    curl localhost:5001/invocations -H 'Content-Type: application/json' \\
      -d "{\\"dataframe_records\\": [{\\"image\\": \\"$(base64 -w0 photo.jpg)\\"}]}"
"""

import base64
import io
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class Classifier(PythonModel):
    """Predicts images given as base64 text in a column ``image``."""

    def load_context(self, context: Any) -> None:
        """Load the weights that were logged with the model."""
        from unfreeze.evaluation.predictor import Predictor

        self._predictor = Predictor(context.artifacts["weights"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Predicted class and one column ``p_<class>`` per class, a row per image."""
        files = [io.BytesIO(base64.b64decode(text)) for text in model_input["image"]]
        return pd.DataFrame(self._predictor.predict(files))


set_model(Classifier())
