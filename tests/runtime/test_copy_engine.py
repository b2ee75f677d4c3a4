"""Copies by address. On a CPU they are made at once, and there is nothing to wait for."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.graph.copy_engine import Block, CopyEngine, Mark, current_stream

CPU = torch.device("cpu")
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.int8])


def counted(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, start: int = 0) -> torch.Tensor:
    """Neighbours differ, in 8 bits as well."""
    return (torch.arange(start, start + prod(shape)) % 101).to(dtype).view(shape)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), DTYPES, st.data())
def test_a_part_lies_where_its_index_says(shape: list[int], dtype: torch.dtype, data: st.DataObject) -> None:
    """Of a tensor that begins behind others, as staging does."""
    whole = counted((3 + prod(shape),), dtype)[3:].view(shape)
    dims = data.draw(st.integers(1, len(shape)))
    index = tuple(data.draw(st.integers(0, size - 1)) for size in shape[:dims])

    block = Block(whole, dims=dims)

    assert block.at(*index) == whole[index].data_ptr()
    assert block.size_bytes == whole[index].nbytes


def test_a_part_is_named_by_all_of_its_dimensions() -> None:
    block = Block(torch.zeros(2, 3, 4), dims=2)

    for index in ((1,), (1, 1, 1)):
        with pytest.raises(ValueError, match=r"zip\(\)"):
            block.at(*index)


@given(st.integers(0, 4), st.integers(0, 4), st.integers(1, 5), DTYPES)
def test_a_copy_moves_exactly_those_bytes(there: int, here: int, parts: int, dtype: torch.dtype) -> None:
    """Some parts in a row; all around them stays."""
    parts = min(parts, 5 - there, 5 - here)
    source, target = counted((2, 5, 7), dtype), counted((5, 7), dtype, start=50)
    expected, before = target.clone(), source.clone()
    expected[here : here + parts] = source[1, there : there + parts]
    come_from, to = Block(source, dims=2), Block(target, dims=1)

    CopyEngine(CPU).copy(to.at(here), come_from.at(1, there), parts * to.size_bytes)

    assert torch.equal(target, expected)
    assert torch.equal(source, before)


def test_without_a_gpu_there_is_no_stream_to_wait_for() -> None:
    engine, mark = CopyEngine(CPU), Mark(CPU)
    mark.hold(engine.stream)
    mark.put(engine.stream)
    mark.hold(current_stream(CPU))

    assert engine.stream is None
    assert current_stream(CPU) is None
