"""Benchmarks of the operators and models against plain PyTorch, torch.compile, ONNX Runtime and OpenVINO.

``specs`` says what is measured, ``work`` and ``training`` build it as ``programs``, ``peers`` and ``runtimes`` are the
contenders, ``runner`` measures by way of ``sampling``, and ``results``, ``report``, ``goals`` and ``chart`` are what
comes of it. ``python -m benchmarks --help`` runs them; ``python -m benchmarks.goals`` puts the parts of the suite
"record" together, ``python -m benchmarks.memory`` measures peak memory.
"""
