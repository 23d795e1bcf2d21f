"""Training and evaluation of classifiers: ``python -m ffnet train`` and ``python -m ffnet eval``.

Nothing here is imported by ``import ffnet``. ``docs/training.md`` explains how it is used.
"""
