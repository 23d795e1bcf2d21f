"""How operators run, one module a backend; :mod:`.choice` chooses among them.

A backend is a module with

``OPERATORS``
    the names of those it has kernels for; it need not have all (the reference takes every call and has no such list);
``unavailable() -> str | None``
    why it cannot run at all on this machine, or None;
``refusal(operator, args) -> str | None``
    why it does not take this call, or None. The chooser reads it quietly, a forced backend raises it;
``slower(operator, args) -> str | None``
    why plain PyTorch was measured to be faster at this call, or None; only the chooser asks;
``describe(operator, args) -> str``
    which variant it would run, for ``explain``.

Gradients are composed of a backend's primitives, where it has no kernel for all of one: ``convolve``, ``activated``,
``activation_backward``, ``convolve_backward`` and ``scaled_filter_gradients`` as in :mod:`.reference`.
"""
