"""Private interfaces of other libraries, in one place: an upgrade that removes one breaks here, and `tests/test_compat.py` names it."""

import os
import tarfile
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from imprompt.errors import UserError

ConvGeometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]  # padding, stride, dilation, groups

CPU_BF16_VARIABLE = "IMPROMPT_CPU_BF16"
_PREPACKING_OPS = ("_reorder_convolution_weight", "_convolution_pointwise", "_reorder_linear_weight", "_linear_pointwise")


def cpu_supports_bfloat16() -> bool:
    """Whether bfloat16 is worth choosing on the CPU: it has instructions for it (AVX512-BF16, AVX-NE-CONVERT, AMX, or ARM's).

    The environment variable IMPROMPT_CPU_BF16 overrides this: `on`, `off`, or `auto`, the default. Switched on where the CPU
    has no such instructions, bfloat16 is emulated: correct, and many times slower. Raises UserError for any other value.
    """
    setting = os.environ.get(CPU_BF16_VARIABLE) or "auto"
    if setting not in ("auto", "on", "off"):
        raise UserError(f"{CPU_BF16_VARIABLE}: expected auto, on or off, received {setting!r}")
    if setting != "auto":
        return setting == "on"
    # oneDNN also takes bfloat16 on CPUs with AVX-512 alone, where it is emulated: mini takes twice the time of float32.
    emulated = torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()
    return has_bfloat16_kernels() and not emulated


def has_bfloat16_kernels() -> bool:
    """Whether oneDNN's operators take bfloat16 on this CPU at all; no variable overrides this."""
    return hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_prepacking_ops() -> bool:
    """Whether this build of torch has the oneDNN operators below, which its own compiler uses, with kernels for bfloat16."""
    return has_bfloat16_kernels() and all(hasattr(torch.ops.mkldnn, name) for name in _PREPACKING_OPS)


def reorder_conv_weight(weight: Tensor, geometry: ConvGeometry, input_shape: Sequence[int]) -> Tensor:
    """The weight of a convolution in oneDNN's blocked layout, for `mkldnn_conv2d`. weight: (out, in / groups, height, width)."""
    return cast(Tensor, torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(input_shape)))


def mkldnn_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """A convolution with a weight from `reorder_conv_weight`: (batch, in, height, width) → (batch, out, height, width), channels last."""
    return cast(Tensor, torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, "none", [], ""))


def reorder_linear_weight(weight: Tensor, rows: int) -> Tensor:
    """The weight of a linear layer in oneDNN's blocked layout, for inputs of about `rows` rows. weight: (out, in)."""
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight, rows))


def mkldnn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer with a weight from `reorder_linear_weight`: (..., in) → (..., out)."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


def tensor_version(tensor: Tensor) -> int:
    """A number that grows with every in-place change of the tensor; -1 for tensors of inference mode, which do not count."""
    return -1 if tensor.is_inference() else tensor._version


def unwrap_compiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile(module)` wrapped; any other module itself."""
    return cast(nn.Module, getattr(module, "_orig_mod", module))


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether `compile()` was called on the module or on one of its submodules."""
    return any(part._compiled_call_impl for part in module.modules())


def reset_accelerate_state() -> None:
    """Forget the settings of an earlier Accelerator of this process, so that the next one may use another precision."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()


MAX_TAR_HEADER_BYTES = 2**20


class BoundedTarInfo(tarfile.TarInfo):
    """Members of a tar archive whose extended headers, which tarfile holds in memory, have a limited size."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        extended = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if self.type in extended and self.size > MAX_TAR_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes; expected at most {MAX_TAR_HEADER_BYTES}")
        member: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        return member
