"""Batches on the device: the order of the images, their augmented views, and the rendering of the views.

It may import `unfreeze.data`, `unfreeze.models` and what is below them; evaluation, training and the pipeline may import it.
"""
