"""The kernel benchmark suite: ``python -m benchmarks`` lists its commands.

``cases`` says what is measured, and which cases together; ``work`` builds it and ``contenders`` compute it; ``runner``
times them on the CPU and measures the roofline; ``gpu`` checks and times them on a GPU. ``results`` holds the outcome,
which ``report``, ``charts``, ``goals`` and ``tables`` read.
"""
