"""Fixture for versions of torch whose private operators differ from the tested ones."""

from collections.abc import Iterator

import pytest
import torch

from unfreeze.acceleration.frozen import fused_convolutions_work


@pytest.fixture(params=["gone", "other arguments", "other results"])
def changed_convolutions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Change the private operator that reorders weights for oneDNN, as another version of torch might."""
    reorder = torch._C._nn.mkldnn_reorder_conv2d_weight

    def changed(*arguments: object) -> torch.Tensor:
        if request.param == "gone":
            raise AttributeError("no such operator")
        if request.param == "other arguments":
            raise TypeError("takes 9 arguments")
        return reorder(*arguments) * 2

    monkeypatch.setattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", changed)
    fused_convolutions_work.cache_clear()
    yield
    fused_convolutions_work.cache_clear()
