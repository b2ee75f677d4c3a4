"""Two layers, three steps, worked out by hand and compared span by span.

The machine of ``builders`` takes 3 s for a layer's qkv (1536 bytes of weights at 512 B/s), 1 s each for its output and
feed-forward matrices, 1/8 s to attend to a token (64 bytes) and 1 s for the head. The link moves 64 B/s, a token a
second, unless a test says otherwise. A prompt token's passes between a layer's products read or write 1040 entries: 30 of
16 by the norms and residual sums, 14 of 32 by the rotation, 96 by what is stored and copied, 16 by the activation; that is
4.0625 s. Arithmetic, launches and set-ups take no time. All times are sums of eighths (or
smaller halves), which floats hold exactly, so the lists are compared with ==.
"""

from typing import Any

from builders import in_hbm, make_cost, make_machine, make_setting, newest_in_hbm
from sim.attention import Selector
from sim.engine import simulate
from sim.plan import Plan, WriteBack
from sim.trace import Level, Resource, Span, Tier, WaveTrace

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
    return make_setting(selector, output=3, machine=make_machine(link_bytes_per_s=link_bytes_per_s), **changes)


def test_all_in_hbm() -> None:
    """7, 8 and 9 tokens cached: a layer takes 5 + 7 * 4.0625 s in the prefill, then 3 + 1 + 2 and 3 + 9/8 + 2."""
    wave = timeline(in_hbm(setting_of(prompt=7)))

    assert list(wave.spans) == [
        Span(Resource.GPU, "query", 0, 0, 0, 3),
        Span(Resource.GPU, "attend", 0, 0, 3, 3),
        Span(Resource.GPU, "rest", 0, 0, 3, 33.4375),
        Span(Resource.GPU, "query", 0, 1, 33.4375, 36.4375),
        Span(Resource.GPU, "attend", 0, 1, 36.4375, 36.4375),
        Span(Resource.GPU, "rest", 0, 1, 36.4375, 66.875),
        Span(Resource.GPU, "head", 0, None, 66.875, 67.875),
        Span(Resource.GPU, "query", 1, 0, 67.875, 70.875),
        Span(Resource.GPU, "attend", 1, 0, 70.875, 71.875),
        Span(Resource.GPU, "rest", 1, 0, 71.875, 73.875),
        Span(Resource.GPU, "query", 1, 1, 73.875, 76.875),
        Span(Resource.GPU, "attend", 1, 1, 76.875, 77.875),
        Span(Resource.GPU, "rest", 1, 1, 77.875, 79.875),
        Span(Resource.GPU, "head", 1, None, 79.875, 80.875),
        Span(Resource.GPU, "query", 2, 0, 80.875, 83.875),
        Span(Resource.GPU, "attend", 2, 0, 83.875, 85),
        Span(Resource.GPU, "rest", 2, 0, 85, 87),
        Span(Resource.GPU, "query", 2, 1, 87, 90),
        Span(Resource.GPU, "attend", 2, 1, 90, 91.125),
        Span(Resource.GPU, "rest", 2, 1, 91.125, 93.125),
        Span(Resource.GPU, "head", 2, None, 93.125, 94.125),
    ]
    assert wave.step_end_s == (67.875, 80.875, 94.125)
    assert list(wave.levels) == [
        Level(Tier.HBM, 0, 0, 2 * 7 * 64),
        Level(Tier.HOST, 0, 0, 0),
        Level(Tier.HBM, 1, 67.875, 2 * 8 * 64),
        Level(Tier.HOST, 1, 67.875, 0),
        Level(Tier.HBM, 2, 80.875, 2 * 9 * 64),
        Level(Tier.HOST, 2, 80.875, 0),
    ]


def test_the_same_by_operation() -> None:
    wave = timeline(in_hbm(setting_of(prompt=7)), ops=True)

    assert rows_of(wave, Resource.GPU)[6:15] == [
        ("attention", 0, 1, 36.4375, 36.4375),
        ("out", 0, 1, 36.4375, 37.4375),
        ("mlp", 0, 1, 37.4375, 38.4375),
        ("norms", 0, 1, 38.4375, 66.875),
        ("head", 0, None, 66.875, 67.875),
        ("qkv", 1, 0, 67.875, 70.875),
        ("attention", 1, 0, 70.875, 71.875),
        ("out", 1, 0, 71.875, 72.875),
        ("mlp", 1, 0, 72.875, 73.875),
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
        ("rest", 0, 0, 3, 33.4375),
        ("query", 0, 1, 47.4375, 50.4375),
        ("attend", 0, 1, 50.4375, 50.4375),
        ("rest", 0, 1, 50.4375, 80.875),
        ("head", 0, None, 94.875, 95.875),
        ("query", 1, 0, 95.875, 98.875),
        ("attend", 1, 0, 98.875, 99.875),
        ("rest", 1, 0, 99.875, 101.875),
        ("query", 1, 1, 101.875, 104.875),
        ("attend", 1, 1, 109.875, 110.875),  # 5 s after its query
        ("rest", 1, 1, 110.875, 112.875),
        ("head", 1, None, 112.875, 113.875),
        ("query", 2, 0, 125.875, 128.875),  # behind the fetch for its own layer
        ("attend", 2, 0, 128.875, 130),
        ("rest", 2, 0, 130, 132),
        ("query", 2, 1, 132, 135),
        ("attend", 2, 1, 141.875, 143),
        ("rest", 2, 1, 143, 145),
        ("head", 2, None, 145, 146),
    ]
    assert rows_of(wave, Resource.H2D) == [
        ("fetch", 1, 0, 47.4375, 61.4375),  # once the prefill's first layer has left its buffer
        ("fetch", 1, 1, 95.875, 109.875),
        ("fetch", 2, 0, 109.875, 125.875),
        ("fetch", 2, 1, 125.875, 141.875),
    ]
    assert rows_of(wave, Resource.D2H) == [
        ("write", 0, 0, 33.4375, 47.4375),
        ("write", 0, 1, 80.875, 94.875),
        ("write", 1, 0, 101.875, 103.875),
        ("write", 1, 1, 112.875, 114.875),
    ]
    assert bytes_of(wave, Resource.H2D) == [7 * 64, 7 * 64, 8 * 64, 8 * 64]
    assert bytes_of(wave, Resource.D2H) == [7 * 64, 7 * 64, 64, 64]
    assert wave.step_end_s == (95.875, 125.875, 146)
    # One slot in two layers, and two layers of the prompt on their way out, or two buffers of fetched tokens.
    assert levels_of(wave, Tier.HBM) == [
        (0, 0, 2 * 64 + 2 * 6 * 64),
        (1, 95.875, 2 * 64 + 2 * 7 * 64),
        (2, 125.875, 2 * 64 + 2 * 8 * 64),
    ]
    # What is written during a step has its place on the host from the step's start.
    assert levels_of(wave, Tier.HOST) == [(0, 0, 2 * 7 * 64), (1, 95.875, 2 * 8 * 64), (2, 125.875, 2 * 8 * 64)]


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
        ("rest", 0, 0, 3, 33.4375),
        ("query", 0, 1, 39.4375, 42.4375),
        ("attend", 0, 1, 42.4375, 42.4375),
        ("rest", 0, 1, 42.4375, 72.875),
        ("head", 0, None, 78.875, 79.875),
        ("query", 1, 0, 79.875, 83.625),
        ("attend", 1, 0, 84.625, 85.625),
        ("rest", 1, 0, 85.625, 87.625),
        ("query", 1, 1, 87.625, 91.375),
        ("attend", 1, 1, 92.375, 93.375),
        ("rest", 1, 1, 93.375, 95.375),
        ("head", 1, None, 95.375, 96.375),
        ("query", 2, 0, 96.375, 100.21875),  # 3 + 9 * 3/32
        ("attend", 2, 0, 101.21875, 102.21875),
        ("rest", 2, 0, 102.21875, 104.21875),
        ("query", 2, 1, 104.21875, 108.0625),
        ("attend", 2, 1, 109.0625, 110.0625),
        ("rest", 2, 1, 110.0625, 112.0625),
        ("head", 2, None, 112.0625, 113.0625),
    ]
    assert rows_of(wave, Resource.H2D) == [
        ("fetch", 1, 0, 42.4375, 44.4375),
        ("correct", 1, 0, 83.625, 84.625),
        ("fetch", 1, 1, 84.625, 86.625),
        ("correct", 1, 1, 91.375, 92.375),
        ("fetch", 2, 0, 92.375, 94.375),
        ("correct", 2, 0, 100.21875, 101.21875),
        ("fetch", 2, 1, 101.21875, 103.21875),
        ("correct", 2, 1, 108.0625, 109.0625),
    ]
    assert rows_of(wave, Resource.D2H) == [
        ("write", 0, 0, 33.4375, 39.4375),
        ("write", 0, 1, 72.875, 78.875),
        ("write", 1, 0, 87.625, 88.625),
        ("write", 1, 1, 95.375, 96.375),
    ]
    # Two slots, two buffers of two fetched tokens, and the keys (32 bytes) of all that are on the host.
    assert levels_of(wave, Tier.HBM) == [
        (0, 0, 2 * (2 * 64 + 5 * 32) + 2 * 5 * 64),
        (1, 79.875, 2 * (2 * 64 + 6 * 32) + 2 * 2 * 64),
        (2, 96.375, 2 * (2 * 64 + 7 * 32) + 2 * 2 * 64),
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
        ("rest", 0, 0, 3, 17.1875),
        ("query", 0, 1, 29.1875, 32.1875),
        ("attend", 0, 1, 32.1875, 32.1875),
        ("rest", 0, 1, 32.1875, 46.375),
        ("head", 0, None, 58.375, 59.375),
        ("query", 1, 0, 59.375, 62.375),
        ("attend", 1, 0, 62.375, 62.875),
        ("rest", 1, 0, 62.875, 64.875),
        ("query", 1, 1, 64.875, 67.875),
        ("attend", 1, 1, 67.875, 68.375),
        ("rest", 1, 1, 68.375, 70.375),
        ("head", 1, None, 70.375, 71.375),
        ("query", 2, 0, 74.375, 77.375),
        ("attend", 2, 0, 77.375, 78),
        ("rest", 2, 0, 78, 80),
        ("query", 2, 1, 80, 83),
        ("attend", 2, 1, 83, 83.625),
        ("rest", 2, 1, 83.625, 85.625),
        ("head", 2, None, 85.625, 86.625),
    ]
    assert rows_of(wave, Resource.D2H) == [
        ("write", 0, 0, 17.1875, 29.1875),
        ("write", 0, 1, 46.375, 58.375),
        ("write", 1, 0, 64.875, 68.875),
        ("write", 1, 1, 70.375, 74.375),
        ("write", 2, 0, 80, 84),
        ("write", 2, 1, 85.625, 89.625),
    ]
    assert rows_of(wave, Resource.H2D) == []
    assert wave.step_end_s == (59.375, 74.375, 89.625)
    assert levels_of(wave, Tier.HOST) == [(0, 0, 2 * 3 * 64), (1, 59.375, 2 * 4 * 64), (2, 74.375, 2 * 5 * 64)]
