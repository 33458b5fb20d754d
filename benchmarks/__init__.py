"""Speed and accuracy against a peer and against what the machine can do, each compared within one run."""

from pipeline.process.environment import set_environment

set_environment()  # before torch is imported, as for the steps
