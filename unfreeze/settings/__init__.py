"""The settings of `params.yaml`: their types and limits, how they are read, checked and changed.

It may import `unfreeze.persistence`, `errors`, `device`, `parallel` and `progress`; everything else may import it.
"""
