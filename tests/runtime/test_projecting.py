"""What a streamed step projects again from saved inputs is what the decoder does. Without a GPU the kernels are interpreted."""

from dataclasses import replace

import pytest
import torch

from runtime.graph.projecting import projection_of
from runtime.models.decoder import Decoder
from sim.spec import DType
from tests.runtime.graphs import DTYPES_TRIED, ROUNDINGS, decoder, kernels

ROWS = 5
AROUND = 2  # rows of the buffer before and after


def drawn(family: str, dtype: DType) -> Decoder:
    """With norms that scale and shift each channel otherwise, and each layer's."""
    made, generator = decoder(family, dtype, seed=3), torch.Generator().manual_seed(4)
    for layer in made.weights.layers:
        norm = layer.attention_norm
        for one in (norm.weight, norm.bias, layer.query_norm, layer.key_norm):
            if one is not None:
                one.add_(torch.rand(one.shape, generator=generator).to(one))
    return made


def projected(made: Decoder, layer: int, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Into the middle of a buffer, [row, 2 * kv_dim]; nothing around it is written."""
    width = 2 * made.spec.kv_dim
    whole = torch.full((ROWS + 2 * AROUND, width), torch.nan, dtype=made.dtype, device=made.device)
    inputs = made.attention_input(layer, x)
    given = inputs.clone()

    projection_of(made)(layer, inputs, positions, whole[AROUND:-AROUND])

    assert whole[:AROUND].isnan().all()
    assert whole[-AROUND:].isnan().all()
    assert torch.equal(inputs, given)  # another step projects them again
    return whole[AROUND:-AROUND]


def check(made: Decoder, layer: int) -> None:
    x = torch.randn((ROWS, made.spec.hidden), generator=torch.Generator().manual_seed(layer))
    x = (3 * x).to(made.device, made.dtype)
    positions = torch.tensor([0, 1, 7, 90, 150], device=made.device)

    keys, values = made.reproject(layer, x[None], positions[None])
    got = projected(made, layer, x, positions)

    want = torch.cat((keys[0].flatten(1), values[0].flatten(1)), dim=1).float()
    size = want.abs().amax(-1, keepdim=True)
    off = ROUNDINGS * torch.finfo(made.dtype).eps / 2
    torch.testing.assert_close(got.float() / size, want / size, atol=off, rtol=0)


@kernels
@pytest.mark.parametrize("dtype", DTYPES_TRIED)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", ["opt", "grouped llama", "grouped qwen3"])
def test_inputs_are_projected_as_the_decoder_does(family: str, layer: int, dtype: DType) -> None:
    check(drawn(family, dtype), layer)


@kernels
@pytest.mark.parametrize("dtype", DTYPES_TRIED)
def test_a_decoder_that_norms_afterwards_projects_its_inputs_as_they_are(dtype: DType) -> None:
    made = drawn("opt", dtype)
    made.config = replace(made.config, pre_norm=False)

    check(made, 0)
