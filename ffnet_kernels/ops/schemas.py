"""The schemas of all operators, defined in one place.

``csrc/build.py`` loads this file by its path and compiles them into the native libraries, so that a C++ program needs
nothing else; without a library, ``_operator.py`` defines them. So this file imports nothing.
"""

from __future__ import annotations

_CONVOLUTION = "Tensor {0}weight, Tensor? {0}bias, int[2] {0}stride, int[4] {0}padding, str {0}activation"
_POINTWISE = (
    "Tensor expand_weight, Tensor? expand_bias, Tensor project_weight, Tensor? project_bias, str activation, "
    "Tensor? scale"
)
_BRANCHES = (
    "Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor? other_weight, Tensor? other_gamma, Tensor? other_beta"
)

#: The arguments of operators with a backward operator; ``residual``, added to the result, is the last of the tensors.
ARGUMENTS = {
    "depthwise_conv2d": f"Tensor x, {_CONVOLUTION.format('')}",
    "conv2d": f"Tensor x, {_CONVOLUTION.format('')}, Tensor? scale, Tensor? residual",
    "ffnified_attention": (
        "Tensor query, Tensor key, Tensor? key_bias, Tensor value, Tensor? value_bias, str activation, "
        "Tensor? scale, Tensor? residual"
    ),
    "channel_mixer": f"Tensor x, Tensor weight, Tensor? bias, {_POINTWISE}, Tensor? residual",
}

#: Operators of training steps: arguments, results, and what the backward operator takes between the gradient and
#: ``wants_x``.
TRAINING = {
    "batch_norm": (
        "Tensor x, Tensor gamma, Tensor beta, float eps, str activation",
        "Tensor, Tensor, Tensor",
        "Tensor x, Tensor gamma, Tensor beta, Tensor mean, Tensor variance, float eps, str activation",
    ),
    "branched_depthwise": (
        f"{_BRANCHES}, float[] eps, int[2] stride, str activation",
        "Tensor, Tensor, Tensor",
        f"{_BRANCHES}, Tensor mean, Tensor variance, float[] eps, str activation",
    ),
    "feed_forward": (
        f"Tensor x, {_POINTWISE}, Tensor? residual",
        "Tensor, Tensor",
        f"Tensor x, Tensor z, {_POINTWISE}",
    ),
}

#: Two convolutions, such as those of a stem, without a map between them: for programs, which run below autograd.
CONV2D_PAIR = f"conv2d_pair(Tensor x, {_CONVOLUTION.format('')}, {_CONVOLUTION.format('next_')}) -> Tensor"

#: A channel mixer with a LayerNorm behind its depthwise convolution, ConvNeXt's block: for programs, too.
NORM_MIXER = (
    "norm_mixer(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    f"{_POINTWISE}, Tensor? residual) -> Tensor"
)

#: Any of these in a row, see ``csrc/bindings/torch_cpu_steps.cpp``: for programs.
STEPS = "steps(Tensor[] values, int[] numbers) -> Tensor"
STEP_OPERATORS = ("conv2d", "conv2d_pair", "depthwise_conv2d", "ffnified_attention", "channel_mixer", "norm_mixer")

#: The operators that the CUDA library and the Triton kernels have in namespaces of their own.
ON_GPUS = ("depthwise_conv2d", "ffnified_attention", "channel_mixer")


def of_operator(name: str) -> tuple[str, str, str]:
    """An operator's schemas: its own, its backward operator's, and the fallback for calls that a kernel of the latter
    does not take."""
    arguments = ARGUMENTS[name]
    of_backward = f"(Tensor grad, {arguments}, bool[] mask) -> Tensor[]"
    return (
        f"{name}({arguments}) -> Tensor",
        f"{name}_backward{of_backward}",
        f"{name}_backward_composed{of_backward}",
    )


def of_training(name: str) -> tuple[str, str]:
    """The schemas of an operator of training steps and of its backward operator."""
    arguments, results, backward = TRAINING[name]
    return (
        f"{name}({arguments}) -> ({results})",
        f"{name}_backward(Tensor grad, {backward}, bool wants_x) -> Tensor[]",
    )


def by_namespace() -> dict[str, list[str]]:
    """All schemas that a native library defines, by namespace."""
    return {
        "ffnet_kernels": [
            CONV2D_PAIR,
            NORM_MIXER,
            STEPS,
            *(schema for name in ARGUMENTS for schema in of_operator(name)),
        ],
        "ffnet_kernels_training": [schema for name in TRAINING for schema in of_training(name)],
        "ffnet_kernels_cuda": [schema for name in ON_GPUS for schema in of_operator(name)],
    }


def header() -> str:
    """These as C++: a macro for each namespace that applies ``define`` to its schemas, one for what steps can be."""
    lines = ["// Made by csrc/build.py of ffnet_kernels/ops/schemas.py.", "#pragma once"]
    for namespace, schemas in by_namespace().items():
        calls = "".join(f' \\\n  define("{schema}");' for schema in schemas)
        lines.append(f"#define {namespace.upper()}_SCHEMAS(define){calls}")
    lines.append(f"#define FFNET_KERNELS_STEPS(X) {' '.join(f'X({name})' for name in STEP_OPERATORS)}")
    return "\n".join(lines) + "\n"
