"""The networks: backbones, the classifier, its layer groups and their freezing, weights on disk.

It may import `unfreeze.settings` and `unfreeze.persistence`; batches, evaluation, training and the pipeline may import it.
"""
