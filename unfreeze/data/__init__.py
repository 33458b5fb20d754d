"""From the user's images to packed pixels: sources, decoding, splits, packing, duplicates.

It may import `unfreeze.settings`, `unfreeze.persistence`, `errors`, `device`, `parallel` and `progress`. Batches,
evaluation, training, reports and the pipeline may import it.
"""
