"""Triton kernel that rounds a prompt to INT8 as it is taken in. Imported only where a GPU runs it."""

import triton
import triton.language as tl

from runtime.graph.quantised_kernels import levels_of, range_of


@triton.jit(do_not_specialize=["tokens"])
def round_prompt(
    k_rows,  # [lane, token, head, channel], lanes, tokens and heads as far apart as the strides say
    v_rows,
    k_levels,  # [lane, token, head, channel]
    v_levels,
    v_ranges,  # [lane, token, head, 2]: least and step
    key_ranges,  # [lane, head, group, 2, channel], lanes ``ranges_lane`` apart, heads ``ranges_head``
    waiting,  # [lane, head, group token, channel] in the compute type, likewise
    k_lane,
    k_token,
    k_head,
    v_lane,
    v_token,
    v_head,
    ranges_lane,
    ranges_head,
    waiting_lane,
    waiting_head,
    heads,
    tokens,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One head's group of tokens: keys by channel where the group is whole, else they wait; values token by token."""
    lane, head, group = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    member, channel = tl.arange(0, GROUP), tl.arange(0, PADDED)
    token = group * GROUP + member
    inside, real = channel < CHANNELS, token < tokens
    there = real[:, None] & inside[None, :]
    at = token.to(tl.int64)[:, None]
    k = tl.load(k_rows + lane * k_lane + at * k_token + head * k_head + channel[None, :], mask=there, other=0.0)
    v = tl.load(v_rows + lane * v_lane + at * v_token + head * v_head + channel[None, :], mask=there, other=0.0)
    row = (lane * tokens + token) * heads + head
    out = row[:, None] * CHANNELS + channel[None, :]
    if (group + 1) * GROUP <= tokens:
        k_wide = k.to(tl.float32)
        k_low, k_step = range_of(tl.min(k_wide, 0), tl.max(k_wide, 0))
        tl.store(k_levels + out, levels_of(k_wide, k_low[None, :], k_step[None, :]).to(tl.uint8), mask=there)
        new_range = key_ranges + lane * ranges_lane + head * ranges_head + group * 2 * CHANNELS + channel
        tl.store(new_range, k_low.to(tl.float16), mask=inside)
        tl.store(new_range + CHANNELS, k_step.to(tl.float16), mask=inside)
    else:
        tl.store(k_levels + out, tl.zeros([GROUP, PADDED], tl.uint8), mask=there)
        place = waiting + lane * waiting_lane + head * waiting_head
        tl.store(place + member[:, None] * CHANNELS + channel[None, :], k, mask=there)
    v_wide = v.to(tl.float32)
    v_low, v_step = range_of(
        tl.min(tl.where(inside[None, :], v_wide, float("inf")), 1),
        tl.max(tl.where(inside[None, :], v_wide, float("-inf")), 1),
    )
    tl.store(v_levels + out, levels_of(v_wide, v_low[:, None], v_step[:, None]).to(tl.uint8), mask=there)
    tl.store(v_ranges + 2 * row, v_low.to(tl.float16), mask=real)
    tl.store(v_ranges + 2 * row + 1, v_step.to(tl.float16), mask=real)
