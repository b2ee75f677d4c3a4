"""What a plan's page is made of: the plan, what was predicted and measured of it, and what the planner says, in words."""

from dataclasses import dataclass

from sim.cost import CostModel
from sim.forecast import Forecast
from sim.measured import Measured
from sim.outcome import Outcome
from sim.plan import Plan
from sim.trace import Trace, WaveTrace
from sim.verdict import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A phase's steps, how long they take in all, and what limits them, in words."""

    name: str
    first_step: int
    last_step: int
    seconds: float
    limit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the planner says of the plan. ``sure`` is how sure that is, ``worth`` what one unit more of a resource brings."""

    question: str
    choices: tuple[tuple[str, str], ...]
    losses: tuple[str, ...]
    stretches: tuple[Stretch, ...]
    stretches_of: str
    sure: tuple[str, ...]
    worth: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """One policy beside the plan: its outcome, or the reason why it has none."""

    policy: str
    lossless: bool
    given_up: str
    outcome: Outcome | None
    reason: str | None
    footnote: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A recorded run of the plan and what the page calls it."""

    name: str
    trace: Trace

    def wave_like(self, sequences: int) -> WaveTrace:
        """The first wave of that many sequences, or else the first of all."""
        return next((wave for wave in self.trace.waves if wave.sequences == sequences), self.trace.waves[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the page comes from: versions of what made it, and the commands that make it again."""

    versions: tuple[tuple[str, str], ...]
    commands: tuple[str, ...]
    solved: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """All that a plan's page shows. ``drawn_steps`` bounds the timeline, both ends included; None draws what fits.

    ``raw`` is what a measured profile was fitted to, ``verdict`` a campaign of plans that were run to test one.
    """

    plan: Plan
    cost: CostModel
    priced: Forecast
    simulated: Run
    measured: tuple[Run, ...] = ()
    answer: Answer
    rivals: tuple[Rival, ...] = ()
    origin: Origin
    drawn_steps: tuple[int, int] | None = None
    raw: Measured | None = None
    verdict: Verdict | None = None
