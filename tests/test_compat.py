"""Private interfaces of other libraries still do what imprompt uses them for."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from imprompt.core.optim import newton_schulz, select_compute_dtype
from imprompt.errors import UserError
from imprompt.models.base_pipelines import resolve_dtype, resolve_mixed_precision
from imprompt.utils import compat

GEOMETRY = ([1, 1], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups


def bfloat16(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_bfloat16_support_agrees_with_the_processors_flags():
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    if "avx" not in flags:
        pytest.skip("not an x86 processor under Linux")
    assert not compat.cpu_supports_bfloat16() or "avx512bw" in flags or "avx_ne_convert" in flags


@pytest.mark.skipif(not compat.has_prepacking_ops(), reason="torch was built without oneDNN")
@torch.no_grad()
def test_prepacked_weights_give_the_layers_outputs():
    if not compat.has_bfloat16_kernels():
        pytest.skip("oneDNN does not compute in bfloat16 on this processor")
    conv, linear = nn.Conv2d(8, 16, 3, padding=1).bfloat16(), nn.Linear(24, 12).bfloat16()
    images, rows = bfloat16(2, 8, 6, 6), bfloat16(5, 24)
    conv_weight = compat.reorder_conv_weight(conv.weight, GEOMETRY, images.shape)
    torch.testing.assert_close(compat.mkldnn_conv2d(images, conv_weight, conv.bias, GEOMETRY), conv(images), rtol=2e-2, atol=2e-2)
    linear_weight = compat.reorder_linear_weight(linear.weight, len(rows))
    torch.testing.assert_close(compat.mkldnn_linear(rows, linear_weight, linear.bias), linear(rows), rtol=2e-2, atol=2e-2)


def test_the_version_of_a_tensor_counts_changes_in_place():
    x = torch.zeros(3)
    before = compat.tensor_version(x)
    x.add_(1)
    assert compat.tensor_version(x) > before
    with torch.inference_mode():
        assert compat.tensor_version(torch.zeros(3)) == -1


def test_a_compiled_module_is_unwrapped():
    linear = nn.Linear(2, 2)
    assert compat.unwrap_compiled(torch.compile(linear, backend="eager")) is linear
    assert compat.unwrap_compiled(linear) is linear


def test_compilation_in_place_is_noticed_in_submodules():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert not compat.is_compiled_in_place(model)
    model[1].compile(backend="eager")
    assert compat.is_compiled_in_place(model)


def test_a_second_accelerator_may_use_another_precision():
    precisions = []
    for precision in ("no", "bf16"):
        compat.reset_accelerate_state()
        precisions.append(Accelerator(cpu=True, mixed_precision=precision).mixed_precision)
    compat.reset_accelerate_state()
    assert precisions == ["no", "bf16"]


@pytest.mark.bf16
def test_the_environment_variable_decides_for_every_caller(cpu_bf16):
    expected = torch.bfloat16 if cpu_bf16 else torch.float32
    assert resolve_dtype("auto", "cpu", is_mini=True) == resolve_mixed_precision("auto", "cpu") == expected
    assert select_compute_dtype(torch.device("cpu")) == expected
    assert newton_schulz(torch.randn(2, 8, 4), (3.4445, -4.7750, 2.0315), 5, 1e-7).dtype == expected
    assert resolve_dtype("auto", "cpu", is_mini=False) == torch.float32
    assert resolve_dtype("float16", "cpu", is_mini=True) == torch.float16


@pytest.mark.parametrize(
    ("kernels", "avx512", "native", "expected"),
    [
        (True, True, True, True),
        (True, True, False, False),  # Skylake and Cascade Lake: oneDNN emulates it
        (True, False, False, True),  # AVX-NE-CONVERT, or ARM
        (False, False, False, False),
    ],
)
@pytest.mark.parametrize("setting", ["auto", "", None])
def test_auto_requires_instructions_and_not_only_kernels(kernels, avx512, native, expected, setting, monkeypatch):
    if setting is None:
        monkeypatch.delenv(compat.CPU_BF16_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(compat.CPU_BF16_VARIABLE, setting)
    monkeypatch.setattr(compat, "has_bfloat16_kernels", lambda: kernels)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert compat.cpu_supports_bfloat16() is expected


def test_another_value_of_the_environment_variable_is_refused(monkeypatch):
    monkeypatch.setenv(compat.CPU_BF16_VARIABLE, "yes")
    with pytest.raises(UserError, match="IMPROMPT_CPU_BF16: expected auto, on or off, received 'yes'"):
        compat.cpu_supports_bfloat16()
