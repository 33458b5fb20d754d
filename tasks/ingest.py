"""Read every source image once; validate, split, pack pixels.

The only step that reads image files: later steps read packed pixels. Images that cannot be read are set aside with a
reason. Backbone and weights are not parameters of this step, because its result does not depend on them;
`unfreeze check` finds a typo in them before the long work.
"""

from pipeline.step import Run, step
from pipeline.watchable import check_watched
from unfreeze.data.packing import pack, stamps
from unfreeze.data.sources import read_source
from unfreeze.errors import TransientError, UserError
from unfreeze.settings.schema import Data

CHANGED = (
    "data.source: images in {} were added, changed or removed while they were read: DVC would record the changed "
    "files. Start again when no other process writes there."
)


@step
def ingest(run: Run, seed: int, data: Data) -> dict[str, float]:
    table = read_source(data.source, data.exclude, data.min_images)
    check_watched(data.source, table["file"])
    before = stamps(table)
    run.log("%d images in %s, %d classes", len(table), data.source, table["label"].nunique())
    for note in table.attrs["notes"]:
        run.log("%s", note)
    pixels = run.resumable("pixels.bin")
    try:
        metrics = pack(table, run.path(""), data, seed, pixels)
        changed = not read_source(data.source, data.exclude, data.min_images).equals(table)
    except UserError:
        if stamps(table) == before:
            raise
        changed = True
    if changed or stamps(table) != before:
        raise TransientError(CHANGED.format(data.source))
    run.log("packed %d images, set %d aside", metrics["images"], metrics["broken"])
    return metrics
