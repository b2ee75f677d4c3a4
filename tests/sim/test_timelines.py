"""Two layers, three steps, worked out by hand and compared span by span.

The machine of ``builders`` takes 3 s for a layer's qkv (1536 bytes of weights at 512 B/s), 1 s each for its output and
feed-forward matrices, 1/8 s to attend to a token (64 bytes) and 1 s for the head. The link moves 64 B/s, a token a
second, unless a test says otherwise. Arithmetic, launches and set-ups take no time. All times are sums of eighths (or
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
    """7, 8 and 9 tokens cached: a layer takes 5 s in the prefill, then 3 + 1 + 2 and 3 + 9/8 + 2."""
    wave = timeline(in_hbm(setting_of(prompt=7)))

    assert list(wave.spans) == [
        Span(Resource.GPU, "query", 0, 0, 0, 3),
        Span(Resource.GPU, "attend", 0, 0, 3, 3),
        Span(Resource.GPU, "rest", 0, 0, 3, 5),
        Span(Resource.GPU, "query", 0, 1, 5, 8),
        Span(Resource.GPU, "attend", 0, 1, 8, 8),
        Span(Resource.GPU, "rest", 0, 1, 8, 10),
        Span(Resource.GPU, "head", 0, None, 10, 11),
        Span(Resource.GPU, "query", 1, 0, 11, 14),
        Span(Resource.GPU, "attend", 1, 0, 14, 15),
        Span(Resource.GPU, "rest", 1, 0, 15, 17),
        Span(Resource.GPU, "query", 1, 1, 17, 20),
        Span(Resource.GPU, "attend", 1, 1, 20, 21),
        Span(Resource.GPU, "rest", 1, 1, 21, 23),
        Span(Resource.GPU, "head", 1, None, 23, 24),
        Span(Resource.GPU, "query", 2, 0, 24, 27),
        Span(Resource.GPU, "attend", 2, 0, 27, 28.125),
        Span(Resource.GPU, "rest", 2, 0, 28.125, 30.125),
        Span(Resource.GPU, "query", 2, 1, 30.125, 33.125),
        Span(Resource.GPU, "attend", 2, 1, 33.125, 34.25),
        Span(Resource.GPU, "rest", 2, 1, 34.25, 36.25),
        Span(Resource.GPU, "head", 2, None, 36.25, 37.25),
    ]
    assert wave.step_end_s == (11, 24, 37.25)
    assert list(wave.levels) == [
        Level(Tier.HBM, 0, 0, 2 * 7 * 64),
        Level(Tier.HOST, 0, 0, 0),
        Level(Tier.HBM, 1, 11, 2 * 8 * 64),
        Level(Tier.HOST, 1, 11, 0),
        Level(Tier.HBM, 2, 24, 2 * 9 * 64),
        Level(Tier.HOST, 2, 24, 0),
    ]


def test_the_same_by_operation() -> None:
    wave = timeline(in_hbm(setting_of(prompt=7)), ops=True)

    assert rows_of(wave, Resource.GPU)[5:13] == [
        ("attention", 0, 1, 8, 8),
        ("out", 0, 1, 8, 9),
        ("mlp", 0, 1, 9, 10),
        ("head", 0, None, 10, 11),
        ("qkv", 1, 0, 11, 14),
        ("attention", 1, 0, 14, 15),
        ("out", 1, 0, 15, 16),
        ("mlp", 1, 0, 16, 17),
    ]


def test_fetches_known_ahead() -> None:
    """One slot in HBM, 2 s a token over the link: 7 then 8 tokens are fetched for each layer, 14 and 16 s.

    The first layer's fetch fills the end of the step before; the second layer's starts with the step and keeps the GPU
    waiting. The prefill writes back the 6 prompt tokens without a slot and the one that step 1 leaves none for.
    """
    wave = timeline(newest_in_hbm(setting_of(prompt=7, link_bytes_per_s=32), slots=1))

    assert rows_of(wave, Resource.GPU) == [
        ("query", 0, 0, 0, 3),
        ("attend", 0, 0, 3, 3),
        ("rest", 0, 0, 3, 5),
        ("query", 0, 1, 5, 8),
        ("attend", 0, 1, 8, 8),
        ("rest", 0, 1, 8, 10),
        ("head", 0, None, 10, 11),
        ("query", 1, 0, 33, 36),  # behind the prefill's write-backs
        ("attend", 1, 0, 36, 37),
        ("rest", 1, 0, 37, 39),
        ("query", 1, 1, 39, 42),
        ("attend", 1, 1, 47, 48),  # 5 s after its query
        ("rest", 1, 1, 48, 50),
        ("head", 1, None, 50, 51),
        ("query", 2, 0, 63, 66),  # behind the fetch for its own layer
        ("attend", 2, 0, 66, 67.125),
        ("rest", 2, 0, 67.125, 69.125),
        ("query", 2, 1, 69.125, 72.125),
        ("attend", 2, 1, 79, 80.125),
        ("rest", 2, 1, 80.125, 82.125),
        ("head", 2, None, 82.125, 83.125),
    ]
    assert rows_of(wave, Resource.H2D) == [
        ("fetch", 1, 0, 5, 19),  # once the prefill's first layer has left its buffer
        ("fetch", 1, 1, 33, 47),
        ("fetch", 2, 0, 47, 63),
        ("fetch", 2, 1, 63, 79),
    ]
    assert rows_of(wave, Resource.D2H) == [
        ("write", 0, 0, 5, 19),
        ("write", 0, 1, 19, 33),
        ("write", 1, 0, 39, 41),
        ("write", 1, 1, 50, 52),
    ]
    assert bytes_of(wave, Resource.H2D) == [7 * 64, 7 * 64, 8 * 64, 8 * 64]
    assert bytes_of(wave, Resource.D2H) == [7 * 64, 7 * 64, 64, 64]
    assert wave.step_end_s == (33, 63, 83.125)
    # One slot in two layers, and two layers of the prompt on their way out, or two buffers of fetched tokens.
    assert levels_of(wave, Tier.HBM) == [
        (0, 0, 2 * 64 + 2 * 6 * 64),
        (1, 33, 2 * 64 + 2 * 7 * 64),
        (2, 63, 2 * 64 + 2 * 8 * 64),
    ]
    # What is written during a step has its place on the host from the step's start.
    assert levels_of(wave, Tier.HOST) == [(0, 0, 2 * 7 * 64), (1, 33, 2 * 8 * 64), (2, 63, 2 * 8 * 64)]


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
        ("rest", 0, 0, 3, 5),
        ("query", 0, 1, 5, 8),
        ("attend", 0, 1, 8, 8),
        ("rest", 0, 1, 8, 10),
        ("head", 0, None, 10, 11),
        ("query", 1, 0, 17, 20.75),  # behind the prefill's write-backs
        ("attend", 1, 0, 21.75, 22.75),
        ("rest", 1, 0, 22.75, 24.75),
        ("query", 1, 1, 24.75, 28.5),
        ("attend", 1, 1, 29.5, 30.5),
        ("rest", 1, 1, 30.5, 32.5),
        ("head", 1, None, 32.5, 33.5),
        ("query", 2, 0, 33.5, 37.34375),  # 3 + 9 * 3/32
        ("attend", 2, 0, 38.34375, 39.34375),
        ("rest", 2, 0, 39.34375, 41.34375),
        ("query", 2, 1, 41.34375, 45.1875),
        ("attend", 2, 1, 46.1875, 47.1875),
        ("rest", 2, 1, 47.1875, 49.1875),
        ("head", 2, None, 49.1875, 50.1875),
    ]
    assert rows_of(wave, Resource.H2D) == [
        ("fetch", 1, 0, 8, 10),
        ("correct", 1, 0, 20.75, 21.75),
        ("fetch", 1, 1, 21.75, 23.75),
        ("correct", 1, 1, 28.5, 29.5),
        ("fetch", 2, 0, 29.5, 31.5),
        ("correct", 2, 0, 37.34375, 38.34375),
        ("fetch", 2, 1, 38.34375, 40.34375),
        ("correct", 2, 1, 45.1875, 46.1875),
    ]
    assert rows_of(wave, Resource.D2H) == [
        ("write", 0, 0, 5, 11),
        ("write", 0, 1, 11, 17),
        ("write", 1, 0, 24.75, 25.75),
        ("write", 1, 1, 32.5, 33.5),
    ]
    # Two slots, two buffers of two fetched tokens, and the keys (32 bytes) of all that are on the host.
    assert levels_of(wave, Tier.HBM) == [
        (0, 0, 2 * (2 * 64 + 5 * 32) + 2 * 5 * 64),
        (1, 17, 2 * (2 * 64 + 6 * 32) + 2 * 2 * 64),
        (2, 33.5, 2 * (2 * 64 + 7 * 32) + 2 * 2 * 64),
    ]


def test_write_backs_at_birth() -> None:
    """4 s a token: the prompt's 3 tokens take 12 s a layer, and every newborn one 4 s; a step ends behind the last."""
    setting = setting_of(prompt=3, link_bytes_per_s=16, write_back=WriteBack.AT_BIRTH)

    wave = timeline(in_hbm(setting))

    assert rows_of(wave, Resource.GPU) == [
        ("query", 0, 0, 0, 3),
        ("attend", 0, 0, 3, 3),
        ("rest", 0, 0, 3, 5),
        ("query", 0, 1, 5, 8),
        ("attend", 0, 1, 8, 8),
        ("rest", 0, 1, 8, 10),
        ("head", 0, None, 10, 11),
        ("query", 1, 0, 29, 32),
        ("attend", 1, 0, 32, 32.5),
        ("rest", 1, 0, 32.5, 34.5),
        ("query", 1, 1, 34.5, 37.5),
        ("attend", 1, 1, 37.5, 38),
        ("rest", 1, 1, 38, 40),
        ("head", 1, None, 40, 41),
        ("query", 2, 0, 44, 47),
        ("attend", 2, 0, 47, 47.625),
        ("rest", 2, 0, 47.625, 49.625),
        ("query", 2, 1, 49.625, 52.625),
        ("attend", 2, 1, 52.625, 53.25),
        ("rest", 2, 1, 53.25, 55.25),
        ("head", 2, None, 55.25, 56.25),
    ]
    assert rows_of(wave, Resource.D2H) == [
        ("write", 0, 0, 5, 17),
        ("write", 0, 1, 17, 29),
        ("write", 1, 0, 34.5, 38.5),
        ("write", 1, 1, 40, 44),
        ("write", 2, 0, 49.625, 53.625),
        ("write", 2, 1, 55.25, 59.25),
    ]
    assert rows_of(wave, Resource.H2D) == []
    assert wave.step_end_s == (29, 44, 59.25)
    assert levels_of(wave, Tier.HOST) == [(0, 0, 2 * 3 * 64), (1, 29, 2 * 4 * 64), (2, 44, 2 * 5 * 64)]
