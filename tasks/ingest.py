"""Read every source image once; validate, split, pack pixels.

The only step that touches a JPEG: every later one reads packed pixels. Images that cannot be read are
set aside with a reason. Backbone and weights are looked for here already, before work that would end at a typo.
"""

from tasks.step import Run, step
from unfreeze.packing import pack
from unfreeze.settings import Data, load_settings
from unfreeze.sources import read_source


@step
def ingest(run: Run, seed: int, data: Data) -> dict[str, float]:
    from unfreeze.backbones import check_backbone

    backbone = load_settings().backbone
    check_backbone(backbone.name, backbone.weights)
    table = read_source(data.source)
    run.log("%d images in %s, %d classes", len(table), data.source, table["label"].nunique())
    pixels = run.resumable("pixels.bin")
    metrics = pack(table, run.path(""), data, seed, pixels)
    run.log("packed %d images, set %d aside", metrics["images"], metrics["broken"])
    return metrics
