"""Two layers, three steps, worked out by hand and compared span by span.

The machine of ``builders`` takes 3 s for a layer's qkv (1536 bytes of weights at 512 B/s), 1 s each for its output and
feed-forward matrices, 1/8 s to attend to a token (64 bytes) and 1 s for the head. The link moves 64 B/s, a token a
second, unless a test says otherwise. A prompt token's passes between a layer's products read or write 288 entries where steps
are captured: 9 of 16 by the norms and residual sums, 2 of 32 by the rotation, 64 by what is stored, 16 by the activation; that
is 1.125 s. Launched kernel by kernel they are 1008, with 30 and 14; 3.9375 s. Arithmetic, launches and set-ups take no time.
All times are sums of eighths (or smaller halves), which floats hold exactly, so the lists are compared with ==.
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
    """7, 8 and 9 tokens cached: a layer takes 5 + 7 * 1.125 s in the prefill, then 3 + 1 + 2 and 3 + 9/8 + 2."""
    wave = timeline(in_hbm(setting_of(prompt=7)))

    assert list(wave.spans) == [
        Span(Resource.GPU, "query", 0, 0, 0, 3),
        Span(Resource.GPU, "attend", 0, 0, 3, 3),
        Span(Resource.GPU, "rest", 0, 0, 3, 12.875),
        Span(Resource.GPU, "query", 0, 1, 12.875, 15.875),
        Span(Resource.GPU, "attend", 0, 1, 15.875, 15.875),
        Span(Resource.GPU, "rest", 0, 1, 15.875, 25.75),
        Span(Resource.GPU, "head", 0, None, 25.75, 26.75),
        Span(Resource.GPU, "query", 1, 0, 26.75, 29.75),
        Span(Resource.GPU, "attend", 1, 0, 29.75, 30.75),
        Span(Resource.GPU, "rest", 1, 0, 30.75, 32.75),
        Span(Resource.GPU, "query", 1, 1, 32.75, 35.75),
        Span(Resource.GPU, "attend", 1, 1, 35.75, 36.75),
        Span(Resource.GPU, "rest", 1, 1, 36.75, 38.75),
        Span(Resource.GPU, "head", 1, None, 38.75, 39.75),
        Span(Resource.GPU, "query", 2, 0, 39.75, 42.75),
        Span(Resource.GPU, "attend", 2, 0, 42.75, 43.875),
        Span(Resource.GPU, "rest", 2, 0, 43.875, 45.875),
        Span(Resource.GPU, "query", 2, 1, 45.875, 48.875),
        Span(Resource.GPU, "attend", 2, 1, 48.875, 50),
        Span(Resource.GPU, "rest", 2, 1, 50, 52),
        Span(Resource.GPU, "head", 2, None, 52, 53),
    ]
    assert wave.step_end_s == (26.75, 39.75, 53)
    assert list(wave.levels) == [
        Level(Tier.HBM, 0, 0, 2 * 7 * 64),
        Level(Tier.HOST, 0, 0, 0),
        Level(Tier.HBM, 1, 26.75, 2 * 8 * 64),
        Level(Tier.HOST, 1, 26.75, 0),
        Level(Tier.HBM, 2, 39.75, 2 * 9 * 64),
        Level(Tier.HOST, 2, 39.75, 0),
    ]


def test_the_same_by_operation() -> None:
    wave = timeline(in_hbm(setting_of(prompt=7)), ops=True)

    assert rows_of(wave, Resource.GPU)[6:15] == [
        ("attention", 0, 1, 15.875, 15.875),
        ("out", 0, 1, 15.875, 16.875),
        ("mlp", 0, 1, 16.875, 17.875),
        ("norms", 0, 1, 17.875, 25.75),
        ("head", 0, None, 25.75, 26.75),
        ("qkv", 1, 0, 26.75, 29.75),
        ("attention", 1, 0, 29.75, 30.75),
        ("out", 1, 0, 30.75, 31.75),
        ("mlp", 1, 0, 31.75, 32.75),
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
        ("rest", 0, 0, 3, 12.875),
        ("query", 0, 1, 26.875, 29.875),
        ("attend", 0, 1, 29.875, 29.875),
        ("rest", 0, 1, 29.875, 39.75),
        ("head", 0, None, 53.75, 54.75),
        ("query", 1, 0, 54.75, 57.75),
        ("attend", 1, 0, 57.75, 58.75),
        ("rest", 1, 0, 58.75, 60.75),
        ("query", 1, 1, 60.75, 63.75),
        ("attend", 1, 1, 68.75, 69.75),  # 5 s after its query
        ("rest", 1, 1, 69.75, 71.75),
        ("head", 1, None, 71.75, 72.75),
        ("query", 2, 0, 84.75, 87.75),  # behind the fetch for its own layer
        ("attend", 2, 0, 87.75, 88.875),
        ("rest", 2, 0, 88.875, 90.875),
        ("query", 2, 1, 90.875, 93.875),
        ("attend", 2, 1, 100.75, 101.875),
        ("rest", 2, 1, 101.875, 103.875),
        ("head", 2, None, 103.875, 104.875),
    ]
    assert rows_of(wave, Resource.H2D) == [
        ("fetch", 1, 0, 26.875, 40.875),  # once the prefill's first layer has left its buffer
        ("fetch", 1, 1, 54.75, 68.75),
        ("fetch", 2, 0, 68.75, 84.75),
        ("fetch", 2, 1, 84.75, 100.75),
    ]
    assert rows_of(wave, Resource.D2H) == [
        ("write", 0, 0, 12.875, 26.875),
        ("write", 0, 1, 39.75, 53.75),
        ("write", 1, 0, 60.75, 62.75),
        ("write", 1, 1, 71.75, 73.75),
    ]
    assert bytes_of(wave, Resource.H2D) == [7 * 64, 7 * 64, 8 * 64, 8 * 64]
    assert bytes_of(wave, Resource.D2H) == [7 * 64, 7 * 64, 64, 64]
    assert wave.step_end_s == (54.75, 84.75, 104.875)
    # One slot in two layers, and two layers of the prompt on their way out, or two buffers of fetched tokens.
    assert levels_of(wave, Tier.HBM) == [
        (0, 0, 2 * 64 + 2 * 6 * 64),
        (1, 54.75, 2 * 64 + 2 * 7 * 64),
        (2, 84.75, 2 * 64 + 2 * 8 * 64),
    ]
    # What is written during a step has its place on the host from the step's start.
    assert levels_of(wave, Tier.HOST) == [(0, 0, 2 * 7 * 64), (1, 54.75, 2 * 8 * 64), (2, 84.75, 2 * 8 * 64)]


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
        ("rest", 0, 0, 3, 32.5625),
        ("query", 0, 1, 38.5625, 41.5625),
        ("attend", 0, 1, 41.5625, 41.5625),
        ("rest", 0, 1, 41.5625, 71.125),
        ("head", 0, None, 77.125, 78.125),
        ("query", 1, 0, 78.125, 81.875),
        ("attend", 1, 0, 82.875, 83.875),
        ("rest", 1, 0, 83.875, 85.875),
        ("query", 1, 1, 85.875, 89.625),
        ("attend", 1, 1, 90.625, 91.625),
        ("rest", 1, 1, 91.625, 93.625),
        ("head", 1, None, 93.625, 94.625),
        ("query", 2, 0, 94.625, 98.46875),  # 3 + 9 * 3/32
        ("attend", 2, 0, 99.46875, 100.46875),
        ("rest", 2, 0, 100.46875, 102.46875),
        ("query", 2, 1, 102.46875, 106.3125),
        ("attend", 2, 1, 107.3125, 108.3125),
        ("rest", 2, 1, 108.3125, 110.3125),
        ("head", 2, None, 110.3125, 111.3125),
    ]
    assert rows_of(wave, Resource.H2D) == [
        ("fetch", 1, 0, 41.5625, 43.5625),
        ("correct", 1, 0, 81.875, 82.875),
        ("fetch", 1, 1, 82.875, 84.875),
        ("correct", 1, 1, 89.625, 90.625),
        ("fetch", 2, 0, 90.625, 92.625),
        ("correct", 2, 0, 98.46875, 99.46875),
        ("fetch", 2, 1, 99.46875, 101.46875),
        ("correct", 2, 1, 106.3125, 107.3125),
    ]
    assert rows_of(wave, Resource.D2H) == [
        ("write", 0, 0, 32.5625, 38.5625),
        ("write", 0, 1, 71.125, 77.125),
        ("write", 1, 0, 85.875, 86.875),
        ("write", 1, 1, 93.625, 94.625),
    ]
    # Two slots, two buffers of two fetched tokens, and the keys (32 bytes) of all that are on the host.
    assert levels_of(wave, Tier.HBM) == [
        (0, 0, 2 * (2 * 64 + 5 * 32) + 2 * 5 * 64),
        (1, 78.125, 2 * (2 * 64 + 6 * 32) + 2 * 2 * 64),
        (2, 94.625, 2 * (2 * 64 + 7 * 32) + 2 * 2 * 64),
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
        ("rest", 0, 0, 3, 8.375),
        ("query", 0, 1, 20.375, 23.375),
        ("attend", 0, 1, 23.375, 23.375),
        ("rest", 0, 1, 23.375, 28.75),
        ("head", 0, None, 40.75, 41.75),
        ("query", 1, 0, 41.75, 44.75),
        ("attend", 1, 0, 44.75, 45.25),
        ("rest", 1, 0, 45.25, 47.25),
        ("query", 1, 1, 47.25, 50.25),
        ("attend", 1, 1, 50.25, 50.75),
        ("rest", 1, 1, 50.75, 52.75),
        ("head", 1, None, 52.75, 53.75),
        ("query", 2, 0, 56.75, 59.75),
        ("attend", 2, 0, 59.75, 60.375),
        ("rest", 2, 0, 60.375, 62.375),
        ("query", 2, 1, 62.375, 65.375),
        ("attend", 2, 1, 65.375, 66),
        ("rest", 2, 1, 66, 68),
        ("head", 2, None, 68, 69),
    ]
    assert rows_of(wave, Resource.D2H) == [
        ("write", 0, 0, 8.375, 20.375),
        ("write", 0, 1, 28.75, 40.75),
        ("write", 1, 0, 47.25, 51.25),
        ("write", 1, 1, 52.75, 56.75),
        ("write", 2, 0, 62.375, 66.375),
        ("write", 2, 1, 68, 72),
    ]
    assert rows_of(wave, Resource.H2D) == []
    assert wave.step_end_s == (41.75, 56.75, 72)
    assert levels_of(wave, Tier.HOST) == [(0, 0, 2 * 3 * 64), (1, 41.75, 2 * 4 * 64), (2, 56.75, 2 * 5 * 64)]
