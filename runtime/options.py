"""How a run is asked for, and what comes out of it."""

from dataclasses import dataclass, field

from torch import Tensor

from runtime.recorder import LanePicks, Record, SelectionStats
from runtime.sampling import Sampling
from sim.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to run what a plan leaves open.

    ``per_head`` gives every key head a selection of its own. ``published_ranges`` freezes the ranges of quantised keys
    at the prompt's, as ALISA publishes it. ``stop`` ends a text at the checkpoint's stop tokens. ``places`` are the
    prompts' places in the whole job, which seed their draws; None: in order from 0. Without ``overlap`` a GPU
    does one thing after the other, as a CPU does. ``captured`` steps are replayed (``runtime.graph``): None, on a GPU where
    plan and options allow; True, or not at all.
    """

    sampling: Sampling = field(default_factory=Sampling)
    stop: bool = True
    per_head: bool = False
    published_ranges: bool = False
    record: Record = field(default_factory=Record)
    places: tuple[int, ...] | None = None
    overlap: bool = True
    captured: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """What a sequence generated from one prefill to the next: its token ``first``, which the prefill gave, and those after.

    ``picks`` [decode step, layer, lane] are the selection that this prefill began, None unless they were asked for. A
    token is named by its place in the sequence: the prompt, filled up at the front to the plan's length, and what followed.
    """

    first: int
    picks: LanePicks | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """``picks`` [decode step, layer, sequence] and ``logits`` [sequence, step, vocab] are there where they were asked for.

    Under continuous admission sequences keep no step with each other: ``picks`` is None, and ``stretches`` holds those of
    each sequence, one stretch for each of its prefills; of waves it is empty.

    ``kv_allocated_bytes`` is what the largest wave's pools took in HBM: every part at its own peak, and, unless steps were
    captured, a spare slot a lane.
    """

    completions: tuple[tuple[int, ...], ...]
    trace: Trace
    kv_allocated_bytes: int
    stats: tuple[tuple[SelectionStats, ...], ...]
    picks: LanePicks | None
    logits: Tensor | None
    stretches: tuple[tuple[Stretch, ...], ...] = ()
