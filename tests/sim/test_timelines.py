"""Two layers, three steps, worked out by hand and compared span by span.

The machine of ``builders`` takes 3 s for a layer's qkv (1536 bytes of weights at 512 B/s), 1 s each for its output and
feed-forward matrices, 1/8 s to attend to a token (64 bytes) and 1 s for the head. The link moves 64 B/s, a token a
second, unless a test says otherwise. A prompt token's passes between a layer's products read or write 880 entries: 30 of
16 by the norms and residual sums, 9 of 32 by the rotation, 96 by what is stored and copied, 16 by the activation; that is
3.4375 s. Arithmetic, launches and set-ups take no time. All times are sums of eighths (or
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
    """7, 8 and 9 tokens cached: a layer takes 5 + 7 * 3.4375 s in the prefill, then 3 + 1 + 2 and 3 + 9/8 + 2."""
    wave = timeline(in_hbm(setting_of(prompt=7)))

    assert list(wave.spans) == [
        Span(Resource.GPU, "query", 0, 0, 0, 3),
        Span(Resource.GPU, "attend", 0, 0, 3, 3),
        Span(Resource.GPU, "rest", 0, 0, 3, 29.0625),
        Span(Resource.GPU, "query", 0, 1, 29.0625, 32.0625),
        Span(Resource.GPU, "attend", 0, 1, 32.0625, 32.0625),
        Span(Resource.GPU, "rest", 0, 1, 32.0625, 58.125),
        Span(Resource.GPU, "head", 0, None, 58.125, 59.125),
        Span(Resource.GPU, "query", 1, 0, 59.125, 62.125),
        Span(Resource.GPU, "attend", 1, 0, 62.125, 63.125),
        Span(Resource.GPU, "rest", 1, 0, 63.125, 65.125),
        Span(Resource.GPU, "query", 1, 1, 65.125, 68.125),
        Span(Resource.GPU, "attend", 1, 1, 68.125, 69.125),
        Span(Resource.GPU, "rest", 1, 1, 69.125, 71.125),
        Span(Resource.GPU, "head", 1, None, 71.125, 72.125),
        Span(Resource.GPU, "query", 2, 0, 72.125, 75.125),
        Span(Resource.GPU, "attend", 2, 0, 75.125, 76.25),
        Span(Resource.GPU, "rest", 2, 0, 76.25, 78.25),
        Span(Resource.GPU, "query", 2, 1, 78.25, 81.25),
        Span(Resource.GPU, "attend", 2, 1, 81.25, 82.375),
        Span(Resource.GPU, "rest", 2, 1, 82.375, 84.375),
        Span(Resource.GPU, "head", 2, None, 84.375, 85.375),
    ]
    assert wave.step_end_s == (59.125, 72.125, 85.375)
    assert list(wave.levels) == [
        Level(Tier.HBM, 0, 0, 2 * 7 * 64),
        Level(Tier.HOST, 0, 0, 0),
        Level(Tier.HBM, 1, 59.125, 2 * 8 * 64),
        Level(Tier.HOST, 1, 59.125, 0),
        Level(Tier.HBM, 2, 72.125, 2 * 9 * 64),
        Level(Tier.HOST, 2, 72.125, 0),
    ]


def test_the_same_by_operation() -> None:
    wave = timeline(in_hbm(setting_of(prompt=7)), ops=True)

    assert rows_of(wave, Resource.GPU)[6:15] == [
        ("attention", 0, 1, 32.0625, 32.0625),
        ("out", 0, 1, 32.0625, 33.0625),
        ("mlp", 0, 1, 33.0625, 34.0625),
        ("norms", 0, 1, 34.0625, 58.125),
        ("head", 0, None, 58.125, 59.125),
        ("qkv", 1, 0, 59.125, 62.125),
        ("attention", 1, 0, 62.125, 63.125),
        ("out", 1, 0, 63.125, 64.125),
        ("mlp", 1, 0, 64.125, 65.125),
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
        ("rest", 0, 0, 3, 29.0625),
        ("query", 0, 1, 43.0625, 46.0625),
        ("attend", 0, 1, 46.0625, 46.0625),
        ("rest", 0, 1, 46.0625, 72.125),
        ("head", 0, None, 86.125, 87.125),
        ("query", 1, 0, 87.125, 90.125),
        ("attend", 1, 0, 90.125, 91.125),
        ("rest", 1, 0, 91.125, 93.125),
        ("query", 1, 1, 93.125, 96.125),
        ("attend", 1, 1, 101.125, 102.125),  # 5 s after its query
        ("rest", 1, 1, 102.125, 104.125),
        ("head", 1, None, 104.125, 105.125),
        ("query", 2, 0, 117.125, 120.125),  # behind the fetch for its own layer
        ("attend", 2, 0, 120.125, 121.25),
        ("rest", 2, 0, 121.25, 123.25),
        ("query", 2, 1, 123.25, 126.25),
        ("attend", 2, 1, 133.125, 134.25),
        ("rest", 2, 1, 134.25, 136.25),
        ("head", 2, None, 136.25, 137.25),
    ]
    assert rows_of(wave, Resource.H2D) == [
        ("fetch", 1, 0, 43.0625, 57.0625),  # once the prefill's first layer has left its buffer
        ("fetch", 1, 1, 87.125, 101.125),
        ("fetch", 2, 0, 101.125, 117.125),
        ("fetch", 2, 1, 117.125, 133.125),
    ]
    assert rows_of(wave, Resource.D2H) == [
        ("write", 0, 0, 29.0625, 43.0625),
        ("write", 0, 1, 72.125, 86.125),
        ("write", 1, 0, 93.125, 95.125),
        ("write", 1, 1, 104.125, 106.125),
    ]
    assert bytes_of(wave, Resource.H2D) == [7 * 64, 7 * 64, 8 * 64, 8 * 64]
    assert bytes_of(wave, Resource.D2H) == [7 * 64, 7 * 64, 64, 64]
    assert wave.step_end_s == (87.125, 117.125, 137.25)
    # One slot in two layers, and two layers of the prompt on their way out, or two buffers of fetched tokens.
    assert levels_of(wave, Tier.HBM) == [
        (0, 0, 2 * 64 + 2 * 6 * 64),
        (1, 87.125, 2 * 64 + 2 * 7 * 64),
        (2, 117.125, 2 * 64 + 2 * 8 * 64),
    ]
    # What is written during a step has its place on the host from the step's start.
    assert levels_of(wave, Tier.HOST) == [(0, 0, 2 * 7 * 64), (1, 87.125, 2 * 8 * 64), (2, 117.125, 2 * 8 * 64)]


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
        ("rest", 0, 0, 3, 29.0625),
        ("query", 0, 1, 35.0625, 38.0625),
        ("attend", 0, 1, 38.0625, 38.0625),
        ("rest", 0, 1, 38.0625, 64.125),
        ("head", 0, None, 70.125, 71.125),
        ("query", 1, 0, 71.125, 74.875),
        ("attend", 1, 0, 75.875, 76.875),
        ("rest", 1, 0, 76.875, 78.875),
        ("query", 1, 1, 78.875, 82.625),
        ("attend", 1, 1, 83.625, 84.625),
        ("rest", 1, 1, 84.625, 86.625),
        ("head", 1, None, 86.625, 87.625),
        ("query", 2, 0, 87.625, 91.46875),  # 3 + 9 * 3/32
        ("attend", 2, 0, 92.46875, 93.46875),
        ("rest", 2, 0, 93.46875, 95.46875),
        ("query", 2, 1, 95.46875, 99.3125),
        ("attend", 2, 1, 100.3125, 101.3125),
        ("rest", 2, 1, 101.3125, 103.3125),
        ("head", 2, None, 103.3125, 104.3125),
    ]
    assert rows_of(wave, Resource.H2D) == [
        ("fetch", 1, 0, 38.0625, 40.0625),
        ("correct", 1, 0, 74.875, 75.875),
        ("fetch", 1, 1, 75.875, 77.875),
        ("correct", 1, 1, 82.625, 83.625),
        ("fetch", 2, 0, 83.625, 85.625),
        ("correct", 2, 0, 91.46875, 92.46875),
        ("fetch", 2, 1, 92.46875, 94.46875),
        ("correct", 2, 1, 99.3125, 100.3125),
    ]
    assert rows_of(wave, Resource.D2H) == [
        ("write", 0, 0, 29.0625, 35.0625),
        ("write", 0, 1, 64.125, 70.125),
        ("write", 1, 0, 78.875, 79.875),
        ("write", 1, 1, 86.625, 87.625),
    ]
    # Two slots, two buffers of two fetched tokens, and the keys (32 bytes) of all that are on the host.
    assert levels_of(wave, Tier.HBM) == [
        (0, 0, 2 * (2 * 64 + 5 * 32) + 2 * 5 * 64),
        (1, 71.125, 2 * (2 * 64 + 6 * 32) + 2 * 2 * 64),
        (2, 87.625, 2 * (2 * 64 + 7 * 32) + 2 * 2 * 64),
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
        ("rest", 0, 0, 3, 15.3125),
        ("query", 0, 1, 27.3125, 30.3125),
        ("attend", 0, 1, 30.3125, 30.3125),
        ("rest", 0, 1, 30.3125, 42.625),
        ("head", 0, None, 54.625, 55.625),
        ("query", 1, 0, 55.625, 58.625),
        ("attend", 1, 0, 58.625, 59.125),
        ("rest", 1, 0, 59.125, 61.125),
        ("query", 1, 1, 61.125, 64.125),
        ("attend", 1, 1, 64.125, 64.625),
        ("rest", 1, 1, 64.625, 66.625),
        ("head", 1, None, 66.625, 67.625),
        ("query", 2, 0, 70.625, 73.625),
        ("attend", 2, 0, 73.625, 74.25),
        ("rest", 2, 0, 74.25, 76.25),
        ("query", 2, 1, 76.25, 79.25),
        ("attend", 2, 1, 79.25, 79.875),
        ("rest", 2, 1, 79.875, 81.875),
        ("head", 2, None, 81.875, 82.875),
    ]
    assert rows_of(wave, Resource.D2H) == [
        ("write", 0, 0, 15.3125, 27.3125),
        ("write", 0, 1, 42.625, 54.625),
        ("write", 1, 0, 61.125, 65.125),
        ("write", 1, 1, 66.625, 70.625),
        ("write", 2, 0, 76.25, 80.25),
        ("write", 2, 1, 81.875, 85.875),
    ]
    assert rows_of(wave, Resource.H2D) == []
    assert wave.step_end_s == (55.625, 70.625, 85.875)
    assert levels_of(wave, Tier.HOST) == [(0, 0, 2 * 3 * 64), (1, 55.625, 2 * 4 * 64), (2, 70.625, 2 * 5 * 64)]
