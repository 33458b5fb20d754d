"""Faster versions of a network with the same output: inference for frozen layers, faster training for the others.

It knows PyTorch modules only, and imports nothing of the project but `unfreeze.device`; evaluation and training may import it.
"""
