"""Faster forms of a network that compute the same: frozen layers as inference, faster training of the others.

It knows PyTorch modules only, and imports nothing of the project but `unfreeze.device`; evaluation and training may import it.
"""
