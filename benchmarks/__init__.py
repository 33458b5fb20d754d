"""Benchmarks of speed and accuracy: unfreeze compared with fastai and with the machine's ceiling, within one run."""

from pipeline.process.environment import set_environment

set_environment()  # before torch is imported, as in the steps of the recipe
