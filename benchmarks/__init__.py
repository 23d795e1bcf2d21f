"""Benchmarks of the operators and models against plain PyTorch and torch.compile.

``specs`` says what is measured, ``work`` builds it, ``peers`` are the contenders, ``runner`` measures, and ``results``,
``report`` and ``chart`` are what comes of it. ``python -m benchmarks --help`` runs them.
"""
