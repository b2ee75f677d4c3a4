"""What the distinct waves of a plan do in each step: a layer's times, what the pools hold, who gets which tokens."""

from dataclasses import dataclass

from sim.cost import CostModel
from sim.flows import Flows, flows_of, home_columns
from sim.layer import LayerTimes, layer_times
from sim.layer_prices import layer_prices
from sim.occupancy import Occupancy, occupancy_of
from sim.outcome import Served
from sim.plan import Admission, Plan
from sim.recording import RecordedSelection, replayed_flows
from sim.scheduled import admit, scheduled_times


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveLoad:
    """Sequences that run together; ``held`` is what the KV pools hold for all of them in each step.

    A step is one of every sequence, or one of the machine under continuous admission.
    """

    sequences: int
    times: LayerTimes
    held: Occupancy
    served: tuple[Served, ...]


def wave_loads(plan: Plan, cost: CostModel, recording: RecordedSelection | None) -> tuple[Flows, list[WaveLoad]]:
    """Flows of one sequence, and the distinct waves: a full one, and a smaller last one where there is a rest."""
    setting, homes = plan.setting, home_columns(plan.homes)
    flows = flows_of(plan, homes) if recording is None else replayed_flows(plan, recording)
    occupancy = occupancy_of(plan, homes, flows)
    if setting.admission is Admission.CONTINUOUS:
        planned = admit(setting, occupancy)
        times = scheduled_times(cost, setting, flows, planned)
        held = Occupancy(hbm=planned.held_bytes, host=planned.host_bytes)
        return flows, [WaveLoad(sequences=setting.workload.batch, times=times, held=held, served=planned.served)]
    last_step = plan.homes.steps - 1
    return flows, [
        WaveLoad(
            sequences=size,
            times=layer_times(layer_prices(cost, setting, size), flows, cost),
            held=Occupancy(hbm=size * occupancy.hbm, host=size * occupancy.host),
            served=(Served(sequences=size, first_step=0, last_step=last_step),),
        )
        for size in dict.fromkeys(setting.wave_sizes)
    ]
