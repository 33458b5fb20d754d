"""How good a model is: prediction with and without TTA, metrics, the baseline, the choice of a model, the predictor.

It may import `unfreeze.batches` and what is below it; training, reports and the pipeline may import it.
"""
