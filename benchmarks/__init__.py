"""The kernel benchmark suite: ``python -m benchmarks`` lists its commands.

``cases`` says what is measured, and which cases together; ``work`` builds it and ``contenders`` compute it; ``runner``
times them, by the clock of the CPU or that of `gpu`, and measures the roofline. ``results`` is what comes of it, read
by ``report``, ``charts``, ``goals`` and ``tables``.
"""
