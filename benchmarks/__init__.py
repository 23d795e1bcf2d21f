"""The kernel benchmark suite: ``python -m benchmarks`` lists its commands.

``cases`` and ``suites`` say what is measured; ``work`` and ``training`` build it as ``programs``; ``peers`` and
``runtimes`` are the contenders; ``runner`` times them under the ``roofs`` that it measures. ``results`` is what comes
of it, read by ``report``, ``growth``, ``compare``, ``goals`` and the charts. Names that begin with ``gpu`` do the same
on a GPU.
"""
