"""Requests to the served model through MLflow's own scoring server."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from mlflow.pyfunc import scoring_server
from PIL import Image

from pipeline.tracking import registry
from unfreeze.models.backbones import create_backbone
from unfreeze.models.classifier import Classifier, Head
from unfreeze.models.weights import save_classifier
from unfreeze.settings.schema import Augment

Ask = Callable[[Any], tuple[int, Any]]


def png() -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(22).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


PNG = png()
TEXT = base64.b64encode(PNG).decode()
HALF = base64.b64encode(PNG[: len(PNG) // 2]).decode()


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Function that sends a request; returns the status and the answer, which must be JSON according to RFC 8259."""
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    backbone = create_backbone("timm:test_efficientnet", "none", 32)
    model = Classifier(backbone, Head(backbone.num_features, 3, 0.0))
    save_classifier(model, folder / "model.safetensors", ["a", "b", "c"], 32, Augment("none", 0, 1.1, 0.0))
    mlflow.pyfunc.save_model(
        folder / "model",
        python_model=str(Path(registry.__file__).with_name("served_model.py")),
        artifacts={"weights": str(folder / "model.safetensors")},
        pip_requirements=["torch"],
    )
    app = scoring_server.init(mlflow.pyfunc.load_model(str(folder / "model")))

    def no_number(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    with TestClient(app) as client:

        def asked(body: Any) -> tuple[int, Any]:
            answer = client.post("/invocations", json=body)
            return answer.status_code, json.loads(answer.text, parse_constant=no_number)

        yield asked


def records(*images: object) -> dict[str, Any]:
    return {"dataframe_records": [{"image": image} for image in images]}


@pytest.mark.parametrize(
    "body",
    [
        records(TEXT),
        records("data:image/png;base64," + TEXT),
        records("data:image/png;base64," + TEXT.replace("+", "%2B")),
        records(base64.urlsafe_b64encode(PNG).decode().rstrip("=")),
        records("\n".join(TEXT[i : i + 76] for i in range(0, len(TEXT), 76))),
        {"dataframe_split": {"columns": ["image"], "data": [[TEXT]]}},
        {"instances": [{"image": TEXT}]},
        {"instances": [TEXT]},
        {"inputs": [TEXT]},
        {"inputs": {"image": [TEXT]}},
        {"inputs": {"image": TEXT}},
        {"inputs": TEXT},
    ],
)
def test_an_image_is_read_in_whatever_way_it_comes(ask: Ask, body: Any) -> None:
    status, answer = ask(body)
    assert (status, answer) == ask(records(TEXT)) and status == 200
    [row] = answer["predictions"]
    assert list(row) == ["predicted", "p_a", "p_b", "p_c", "reason"] and row["reason"] == ""
    assert row["p_a"] + row["p_b"] + row["p_c"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (HALF, "damaged: image file is truncated"),
        ("not base64 at all!", "not base64 text"),
        ("naïve", "not base64 text"),
        (None, "not base64 text"),
        ([[1, 2], [3]], "not base64 text"),
        ("", "not an image"),
    ],
)
def test_one_that_cannot_be_read_has_its_reason_and_the_others_their_result(ask: Ask, image: Any, reason: str) -> None:
    status, answer = ask(records(TEXT, image, TEXT))
    [good] = ask(records(TEXT))[1]["predictions"]
    first, bad, last = answer["predictions"]
    assert status == 200
    assert bad == {"predicted": None, "p_a": None, "p_b": None, "p_c": None, "reason": reason}
    for row in (first, last):
        assert row["predicted"] == good["predicted"] and row["reason"] == ""
        assert [row[f"p_{name}"] for name in "abc"] == pytest.approx([good[f"p_{name}"] for name in "abc"], abs=0.01)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"dataframe_records": [{"img": TEXT}]}, "There is no column 'image' but 'img'."),
        ({"dataframe_records": []}, "There is no column 'image' but none at all."),
        ({"dataframe_split": {"columns": ["image"], "data": []}}, "There are no images."),
        ({"inputs": []}, "There are no images."),
        (records([[1, 2], [3, 4]]), "None of the images can be read (image 0: not base64 text)."),
        (records(HALF, None), "can be read (image 0: damaged: image file is truncated; image 1: not base64 text)."),
    ],
)
def test_where_nothing_can_be_read_it_says_so_and_what_to_send(ask: Ask, body: Any, said: str) -> None:
    status, answer = ask(body)
    assert status == 400 and "stack_trace" not in answer
    assert said in answer["message"] and '{"dataframe_records": [{"image": "<base64>"}, ...]}' in answer["message"]
