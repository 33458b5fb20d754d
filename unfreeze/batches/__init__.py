"""Batches on the device: in what order, in which augmented views, and how a view's pixels are computed.

It may import `unfreeze.data`, `unfreeze.models` and what is below them; evaluation, training and the pipeline may import it.
"""
