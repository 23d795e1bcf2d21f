"""The backends that run operators, a module each; :mod:`.choice` selects one for each call.

A backend is a module with

``OPERATORS``
    names of the operators that it has kernels for, not necessarily all (the reference takes every call and has no such
    list);
``unavailable() -> str | None``
    why it cannot run on this machine, or None;
``refusal(operator, args) -> str | None``
    why it does not take this call, or None. Backend selection moves on silently; a forced backend raises it;
``slower(operator, args) -> object | None``
    why plain PyTorch was measured to be faster for this call (:mod:`.crossover`), as ``str`` of it, or None; read by
    backend selection only;
``describe(operator, args) -> str``
    the variant that it would run, for ``explain``.

Where a backend has no kernel for a whole gradient, the gradient is composed of its primitives: ``convolve``,
``activated``, ``activation_backward``, ``convolve_backward`` and ``scaled_filter_gradients`` as in :mod:`.reference`.
"""
