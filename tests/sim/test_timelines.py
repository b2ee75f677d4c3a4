"""Two layers, three steps, worked out by hand and compared span by span.

The machine of ``builders`` takes 3 s for a layer's qkv (1536 bytes of weights at 512 B/s), 1 s each for its output and
feed-forward matrices, 1/8 s to attend to a token (64 bytes) and 1 s for the head. The link moves 64 B/s, a token a
second, unless a test says otherwise. A prompt token's passes between a layer's products read or write 224 entries where steps
are captured: 9 of 16 by the norms and residual sums, 64 by what is stored, 16 by the activation; that is 0.875 s. Launched
kernel by kernel they are 560, with 30 of 16; 2.1875 s. Positions are in the embedding. Arithmetic, launches and set-ups take
no time, nor does what passes between a decode step's products.
All times are sums of eighths (or smaller halves), which floats hold exactly, so the lists are compared with ==.
"""

from typing import Any

import pytest

from builders import in_hbm, make_cost, make_machine, make_model, make_setting, newest_in_hbm
from sim.attention import Selector
from sim.engine import simulate
from sim.plan import Plan, WriteBack
from sim.trace import Level, Resource, Span, Tier, WaveTrace

pytestmark = pytest.mark.usefixtures("nothing_between_products")
Row = tuple[str, int, int | None, float, float]  # name, step, layer, start_s, end_s


def timeline(plan: Plan, *, ops: bool = False) -> WaveTrace:
    trace = simulate(plan, make_cost(plan.setting.machine), ops=ops)
    (wave,) = trace.waves
    return wave


def rows_of(wave: WaveTrace, resource: Resource) -> list[Row]:
    return [(s.name, s.step, s.layer, s.start_s, s.end_s) for s in wave.spans if s.resource is resource]


def bytes_of(wave: WaveTrace, resource: Resource) -> list[float]:
    return [span.size_bytes for span in wave.spans if span.resource is resource]


def levels_of(wave: WaveTrace, tier: Tier) -> list[tuple[int, float, float]]:
    return [(level.step, level.start_s, level.size_bytes) for level in wave.levels if level.tier is tier]


def setting_of(selector: Selector = Selector.DENSE, link_bytes_per_s: float = 64.0, **changes: Any) -> Any:
    machine, model = make_machine(link_bytes_per_s=link_bytes_per_s), make_model(positions=4096)
    return make_setting(selector, output=3, machine=machine, model=model, **changes)


def test_all_in_hbm() -> None:
    """7, 8 and 9 tokens cached: a layer takes 5 + 7 * 0.875 s in the prefill, then 3 + 1 + 2 and 3 + 9/8 + 2."""
    wave = timeline(in_hbm(setting_of(prompt=7)))

    assert list(wave.spans) == [
        Span(Resource.GPU, "query", 0, 0, 0, 3),
        Span(Resource.GPU, "attend", 0, 0, 3, 3),
        Span(Resource.GPU, "rest", 0, 0, 3, 11.125),
        Span(Resource.GPU, "query", 0, 1, 11.125, 14.125),
        Span(Resource.GPU, "attend", 0, 1, 14.125, 14.125),
        Span(Resource.GPU, "rest", 0, 1, 14.125, 22.25),
        Span(Resource.GPU, "head", 0, None, 22.25, 23.25),
        Span(Resource.GPU, "query", 1, 0, 23.25, 26.25),
        Span(Resource.GPU, "attend", 1, 0, 26.25, 27.25),
        Span(Resource.GPU, "rest", 1, 0, 27.25, 29.25),
        Span(Resource.GPU, "query", 1, 1, 29.25, 32.25),
        Span(Resource.GPU, "attend", 1, 1, 32.25, 33.25),
        Span(Resource.GPU, "rest", 1, 1, 33.25, 35.25),
        Span(Resource.GPU, "head", 1, None, 35.25, 36.25),
        Span(Resource.GPU, "query", 2, 0, 36.25, 39.25),
        Span(Resource.GPU, "attend", 2, 0, 39.25, 40.375),
        Span(Resource.GPU, "rest", 2, 0, 40.375, 42.375),
        Span(Resource.GPU, "query", 2, 1, 42.375, 45.375),
        Span(Resource.GPU, "attend", 2, 1, 45.375, 46.5),
        Span(Resource.GPU, "rest", 2, 1, 46.5, 48.5),
        Span(Resource.GPU, "head", 2, None, 48.5, 49.5),
    ]
    assert wave.step_end_s == (23.25, 36.25, 49.5)
    assert list(wave.levels) == [
        Level(Tier.HBM, 0, 0, 2 * 7 * 64),
        Level(Tier.HOST, 0, 0, 0),
        Level(Tier.HBM, 1, 23.25, 2 * 8 * 64),
        Level(Tier.HOST, 1, 23.25, 0),
        Level(Tier.HBM, 2, 36.25, 2 * 9 * 64),
        Level(Tier.HOST, 2, 36.25, 0),
    ]


def test_the_same_by_operation() -> None:
    wave = timeline(in_hbm(setting_of(prompt=7)), ops=True)

    assert rows_of(wave, Resource.GPU)[6:15] == [
        ("attention", 0, 1, 14.125, 14.125),
        ("out", 0, 1, 14.125, 15.125),
        ("mlp", 0, 1, 15.125, 16.125),
        ("norms", 0, 1, 16.125, 22.25),
        ("head", 0, None, 22.25, 23.25),
        ("qkv", 1, 0, 23.25, 26.25),
        ("attention", 1, 0, 26.25, 27.25),
        ("out", 1, 0, 27.25, 28.25),
        ("mlp", 1, 0, 28.25, 29.25),
    ]


def test_fetches_known_ahead() -> None:
    """One slot in HBM, 2 s a token over the link: 7 then 8 tokens are fetched for each layer, 14 and 16 s.

    The first layer's fetch fills the end of the step before; the second layer's starts with the step and keeps the GPU
    waiting. The prefill writes the 6 prompt tokens without a slot and the one that step 1 leaves none for, in line: its next
    layer waits.
    """
    wave = timeline(newest_in_hbm(setting_of(prompt=7, link_bytes_per_s=32), slots=1))

    assert rows_of(wave, Resource.GPU) == [
        ("query", 0, 0, 0, 3),
        ("attend", 0, 0, 3, 3),
        ("rest", 0, 0, 3, 11.125),
        ("query", 0, 1, 25.125, 28.125),
        ("attend", 0, 1, 28.125, 28.125),
        ("rest", 0, 1, 28.125, 36.25),
        ("head", 0, None, 50.25, 51.25),
        ("query", 1, 0, 51.25, 54.25),
        ("attend", 1, 0, 54.25, 55.25),
        ("rest", 1, 0, 55.25, 57.25),
        ("query", 1, 1, 57.25, 60.25),
        ("attend", 1, 1, 65.25, 66.25),  # 5 s after its query
        ("rest", 1, 1, 66.25, 68.25),
        ("head", 1, None, 68.25, 69.25),
        ("query", 2, 0, 81.25, 84.25),  # behind the fetch for its own layer
        ("attend", 2, 0, 84.25, 85.375),
        ("rest", 2, 0, 85.375, 87.375),
        ("query", 2, 1, 87.375, 90.375),
        ("attend", 2, 1, 97.25, 98.375),
        ("rest", 2, 1, 98.375, 100.375),
        ("head", 2, None, 100.375, 101.375),
    ]
    assert rows_of(wave, Resource.H2D) == [
        ("fetch", 1, 0, 25.125, 39.125),  # once the prefill's first layer has left its buffer
        ("fetch", 1, 1, 51.25, 65.25),
        ("fetch", 2, 0, 65.25, 81.25),
        ("fetch", 2, 1, 81.25, 97.25),
    ]
    assert rows_of(wave, Resource.D2H) == [
        ("write", 0, 0, 11.125, 25.125),
        ("write", 0, 1, 36.25, 50.25),
        ("write", 1, 0, 57.25, 59.25),
        ("write", 1, 1, 68.25, 70.25),
    ]
    assert bytes_of(wave, Resource.H2D) == [7 * 64, 7 * 64, 8 * 64, 8 * 64]
    assert bytes_of(wave, Resource.D2H) == [7 * 64, 7 * 64, 64, 64]
    assert wave.step_end_s == (51.25, 81.25, 101.375)
    # One slot in two layers, and two layers of the prompt on their way out, or two buffers of fetched tokens.
    assert levels_of(wave, Tier.HBM) == [
        (0, 0, 2 * 64 + 2 * 6 * 64),
        (1, 51.25, 2 * 64 + 2 * 7 * 64),
        (2, 81.25, 2 * 64 + 2 * 8 * 64),
    ]
    # What is written during a step has its place on the host from the step's start.
    assert levels_of(wave, Tier.HOST) == [(0, 0, 2 * 7 * 64), (1, 51.25, 2 * 8 * 64), (2, 81.25, 2 * 8 * 64)]


def test_recall_guessed_half_right() -> None:
    """Exact top-k of 8 then 9 tokens: the 2 newest and 2 older ones, which all lie on the host.

    Scores read 32 bytes of key and 16 of scores a token: 48/512 s each, 3/4 s at 8 tokens. The guess fetches 2 tokens
    for the next layer; half of it is wrong, so a layer corrects 1 token once its query is known, then guesses on. Two
    gathered tokens are read and written, 1/2 s, and four are attended to, 1/2 s.
    """
    setting = setting_of(Selector.TOPK, prompt=7, sparsity=0.5, guess_hits=0.5)
    assert (setting.token_counts.local, setting.token_counts.selected) == ((2, 2, 2), (2, 2, 2))

    wave = timeline(newest_in_hbm(setting, slots=2))

    assert rows_of(wave, Resource.GPU) == [
        ("query", 0, 0, 0, 3),
        ("attend", 0, 0, 3, 3),
        ("rest", 0, 0, 3, 20.3125),
        ("query", 0, 1, 26.3125, 29.3125),
        ("attend", 0, 1, 29.3125, 29.3125),
        ("rest", 0, 1, 29.3125, 46.625),
        ("head", 0, None, 52.625, 53.625),
        ("query", 1, 0, 53.625, 57.375),
        ("attend", 1, 0, 58.375, 59.375),
        ("rest", 1, 0, 59.375, 61.375),
        ("query", 1, 1, 61.375, 65.125),
        ("attend", 1, 1, 66.125, 67.125),
        ("rest", 1, 1, 67.125, 69.125),
        ("head", 1, None, 69.125, 70.125),
        ("query", 2, 0, 70.125, 73.96875),  # 3 + 9 * 3/32
        ("attend", 2, 0, 74.96875, 75.96875),
        ("rest", 2, 0, 75.96875, 77.96875),
        ("query", 2, 1, 77.96875, 81.8125),
        ("attend", 2, 1, 82.8125, 83.8125),
        ("rest", 2, 1, 83.8125, 85.8125),
        ("head", 2, None, 85.8125, 86.8125),
    ]
    assert rows_of(wave, Resource.H2D) == [
        ("fetch", 1, 0, 29.3125, 31.3125),
        ("correct", 1, 0, 57.375, 58.375),
        ("fetch", 1, 1, 58.375, 60.375),
        ("correct", 1, 1, 65.125, 66.125),
        ("fetch", 2, 0, 66.125, 68.125),
        ("correct", 2, 0, 73.96875, 74.96875),
        ("fetch", 2, 1, 74.96875, 76.96875),
        ("correct", 2, 1, 81.8125, 82.8125),
    ]
    assert rows_of(wave, Resource.D2H) == [
        ("write", 0, 0, 20.3125, 26.3125),
        ("write", 0, 1, 46.625, 52.625),
        ("write", 1, 0, 61.375, 62.375),
        ("write", 1, 1, 69.125, 70.125),
    ]
    # Two slots, two buffers of two fetched tokens, and the keys (32 bytes) of all that are on the host.
    assert levels_of(wave, Tier.HBM) == [
        (0, 0, 2 * (2 * 64 + 5 * 32) + 2 * 5 * 64),
        (1, 53.625, 2 * (2 * 64 + 6 * 32) + 2 * 2 * 64),
        (2, 70.125, 2 * (2 * 64 + 7 * 32) + 2 * 2 * 64),
    ]


def test_write_backs_at_birth() -> None:
    """4 s a token: the prompt's 3 tokens take 12 s, behind which its next layer comes, every newborn one 4 s beside later
    layers; a decode step ends behind the last.
    """
    setting = setting_of(prompt=3, link_bytes_per_s=16, write_back=WriteBack.AT_BIRTH)

    wave = timeline(in_hbm(setting))

    assert rows_of(wave, Resource.GPU) == [
        ("query", 0, 0, 0, 3),
        ("attend", 0, 0, 3, 3),
        ("rest", 0, 0, 3, 7.625),
        ("query", 0, 1, 19.625, 22.625),
        ("attend", 0, 1, 22.625, 22.625),
        ("rest", 0, 1, 22.625, 27.25),
        ("head", 0, None, 39.25, 40.25),
        ("query", 1, 0, 40.25, 43.25),
        ("attend", 1, 0, 43.25, 43.75),
        ("rest", 1, 0, 43.75, 45.75),
        ("query", 1, 1, 45.75, 48.75),
        ("attend", 1, 1, 48.75, 49.25),
        ("rest", 1, 1, 49.25, 51.25),
        ("head", 1, None, 51.25, 52.25),
        ("query", 2, 0, 55.25, 58.25),
        ("attend", 2, 0, 58.25, 58.875),
        ("rest", 2, 0, 58.875, 60.875),
        ("query", 2, 1, 60.875, 63.875),
        ("attend", 2, 1, 63.875, 64.5),
        ("rest", 2, 1, 64.5, 66.5),
        ("head", 2, None, 66.5, 67.5),
    ]
    assert rows_of(wave, Resource.D2H) == [
        ("write", 0, 0, 7.625, 19.625),
        ("write", 0, 1, 27.25, 39.25),
        ("write", 1, 0, 45.75, 49.75),
        ("write", 1, 1, 51.25, 55.25),
        ("write", 2, 0, 60.875, 64.875),
        ("write", 2, 1, 66.5, 70.5),
    ]
    assert rows_of(wave, Resource.H2D) == []
    assert wave.step_end_s == (40.25, 55.25, 70.5)
    assert levels_of(wave, Tier.HOST) == [(0, 0, 2 * 3 * 64), (1, 40.25, 2 * 4 * 64), (2, 55.25, 2 * 5 * 64)]
