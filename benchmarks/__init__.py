"""Speed and accuracy against a peer and against what the machine can do, each compared within one run."""
