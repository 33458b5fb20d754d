"""Evaluation of models: prediction with and without TTA, metrics, the baseline, model selection, the predictor.

It may import `unfreeze.batches` and what is below it; training, reports and the pipeline may import it.
"""
