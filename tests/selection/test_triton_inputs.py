import pytest
import torch
from triton_on_cpu import compile_only, needs_triton, resources

from adaptive_longformer.selection.means import run_means
from adaptive_longformer.selection.select_blocks import choice_masks

pytestmark = needs_triton
MODULE = "adaptive_longformer.selection.triton_inputs"


@pytest.mark.parametrize("with_padding, with_globals", [(True, True), (True, False), (False, True)])
def test_masks_are_those_of_torch(with_padding, with_globals, triton_interpreter):
    generator = torch.Generator().manual_seed(0)
    valid = torch.rand(3, 1500, generator=generator) < 0.9
    valid[2, 700:] = False
    is_global = torch.rand(3, 1500, generator=generator) < 0.01  # in the first row more than 8
    is_global[1] = False
    masks = (valid if with_padding else None, is_global if with_globals else None)
    expected = choice_masks(*masks, 8)
    actual = triton_interpreter(MODULE, "triton_masks", *masks, 8)
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("run", [4, 16])
@pytest.mark.parametrize("counts", ["none", "bool", "float"])
def test_means_are_those_of_torch(counts, run, dtype, triton_interpreter):
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 70, 2, 24, generator=generator).to(dtype).transpose(1, 2)
    weights = torch.rand(2, 70, generator=generator)
    weights[:, 20:40] = 0.0
    given = {"none": None, "bool": weights > 0, "float": weights}[counts]
    if given is not None:
        key[:, :, 25] = torch.nan  # counts nowhere
    means, sums = triton_interpreter(MODULE, "triton_means", key, given, run)
    expected, expected_sums = run_means(key, given, run)
    torch.testing.assert_close(means, expected.to(dtype))
    torch.testing.assert_close(sums, expected_sums.expand(2, -1))


def test_kernels_compile():
    """Those of the lists too."""
    from adaptive_longformer.selection.triton_inputs import triton_masks, triton_means
    from adaptive_longformer.selection.triton_lists import triton_lists

    mask = torch.ones(1, 64, dtype=torch.bool)
    numbers = torch.zeros(1, 2, 4, 8, dtype=torch.int32)
    with compile_only(90) as compiled:
        triton_masks(mask, mask, 8)
        triton_means(torch.zeros(1, 2, 64, 64, dtype=torch.bfloat16), mask, 16)
        triton_lists(
            numbers, numbers[..., 0].contiguous(), numbers[:, :, 0, :2].contiguous(),
            mask[:, :16].view(1, 2, 4, 2), torch.zeros(2, dtype=torch.int64),
            torch.zeros(2, dtype=torch.int64), (8, 8, 64, 16, 16, 3),
            (numbers, numbers[..., 0], numbers, numbers.long()),
        )  # fmt: skip
    assert [name for name, _ in compiled] == ["_masks_kernel", "_means_kernel", "_lists_kernel"]
    assert all(resources(kernel)[1] == 0 for _, kernel in compiled)
