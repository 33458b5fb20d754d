"""From the user's images to packed pixels: sources, decoding, splits, packing, duplicates.

It may import `unfreeze.settings` and `unfreeze.persistence`; batches, evaluation, reports and the pipeline may import it.
"""
