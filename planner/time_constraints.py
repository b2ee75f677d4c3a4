"""How long fetches, layers, write-backs and steps take: at least what each of their pieces and paths says."""

from planner.coefficients import Timing, waited_pieces
from planner.program import Program, Term
from sim.counts import counts_of
from sim.plan import Recompute, WriteBack


def define_fetch_time_constraints(program: Program) -> None:
    """Fetch >= constant + seconds a byte x bytes (of the tokens fetched, less those spared), for each piece of the transfer's
    price, once the link is on.
    """
    from_host = program.problem.setting.recompute is Recompute.ACTIVATIONS_HOST
    for timing, fetch_s in zip(program.problem.timings, program.fetch_s, strict=True):
        for place, knot in enumerate(program.knots):
            streamed_s = float(timing.still.prefetch_s[knot])
            if knot == 0 or program.problem.setting.host_attention:
                program.at_most_s(
                    f"streamed_wave_{timing.sequences}_step_{knot}", [], [(fetch_s[place], -1.0)], -streamed_s
                )
                continue
            for number, (constant_s, per_byte_s) in enumerate(waited_pieces(timing.prices)):
                terms = [
                    (program.kv[place], per_byte_s * float(timing.h2d_bytes_by_kv[knot])),
                    (program.inputs[place], per_byte_s * float(timing.h2d_bytes_by_inputs[knot])),
                ]
                where = f"{number}_wave_{timing.sequences}_step_{knot}"
                spared_s = per_byte_s * float(timing.h2d_bytes_spared[knot])
                linked = (program.linked[place], constant_s + _duplex_s(timing, knot) - spared_s)
                program.at_most_s(f"fetch_{where}", [*terms, linked], [(fetch_s[place], -1.0)], -streamed_s)
                if from_host:
                    switch = (program.recomputing[place], constant_s)
                    program.at_most_s(f"fetch_inputs_{where}", [*terms, switch], [(fetch_s[place], -1.0)], -streamed_s)


def define_layer_time_constraints(program: Program) -> None:
    """Layer >= still + conversions + SM share of gathers + recomputation, for each piece of the recomputation's price.

    The prefill's write-back is in line: part of its layer.
    """
    by_wave = zip(program.problem.timings, program.layer_s, program.fetch_s, program.write_s, strict=True)
    for timing, layer_s, fetch_s, write_s in by_wave:
        for place, knot in enumerate(program.knots):
            common = [
                (program.kv[place], float(timing.gpu_s_by_kv[knot])),
                (program.written[place], timing.gpu_s_by_written if knot else 0.0),
            ]
            times = [(fetch_s[place], timing.prices.sm_share), (layer_s[place], -1.0)]
            if knot == 0:
                times.append((write_s[place], 1.0))
            beside_s = timing.prices.sm_share * float(timing.still.prefetch_s[knot])  # streamed weights take no SMs
            for number, (constant_s, per_token_s) in enumerate(_recompute_pieces(program, timing, knot)):
                second = program.forward[place] if program.problem.uses_forward else program.inputs[place]
                terms = [*common, (second, per_token_s), (program.recomputing[place], constant_s)]
                name = f"layer_{number}_wave_{timing.sequences}_step_{knot}"
                program.at_most_s(name, terms, times, beside_s - float(timing.still.layer_s[knot]))


def define_host_attention_constraints(program: Program) -> None:
    """Layer >= query + round trip + seconds a token x kv + rest, where the CPU attends to what is on the host."""
    if not program.problem.setting.host_attention:
        return
    for timing, layer_s in zip(program.problem.timings, program.layer_s, strict=True):
        for number, (round_trip_s, per_token_s) in enumerate(timing.prices.host_attention.pieces):
            for place, knot in enumerate(program.knots[1:], 1):
                terms = [(program.kv[place], per_token_s), (program.linked[place], round_trip_s)]
                beside_s = float(timing.still.query_s[knot] + timing.still.rest_s[knot])
                name = f"host_attention_{number}_wave_{timing.sequences}_step_{knot}"
                program.at_most_s(name, terms, [(layer_s[place], -1.0)], -beside_s)


def define_write_time_constraints(program: Program) -> None:
    """Write >= setup + seconds a byte x bytes written, in the steps after which tokens leave HBM."""
    at_birth = program.problem.setting.write_back is WriteBack.AT_BIRTH
    for timing, write_s in zip(program.problem.timings, program.write_s, strict=True):
        for place, knot in enumerate(program.knots):
            if knot and place + 1 == len(program.knots) and not at_birth:
                continue
            setup_s, per_byte_s = (timing.prices.stream if knot else timing.prices.prompt_write).pieces[-1]
            seconds = per_byte_s + timing.duplex_s_per_byte * (1.0 if knot else 0.0)
            terms = [(program.written[place], seconds * timing.d2h_bytes_by_written)]
            still_s = float(timing.still.write_s[knot])
            if knot == 0:
                kept, living = _kept_by_prefill(program)
                terms += [(variable, sign * seconds * timing.d2h_bytes_by_written) for variable, sign in kept]
                terms.append((program.saved[0], seconds * timing.d2h_bytes_by_saved))
                still_s += living * seconds * timing.d2h_bytes_by_written
            if not at_birth and place + 1 < len(program.knots):
                terms.append((program.linked[place + 1], setup_s))
            program.at_most_s(f"write_wave_{timing.sequences}_step_{knot}", terms, [(write_s[place], -1.0)], -still_s)


def define_step_time_constraints(program: Program) -> None:
    """A step is at least as long as each path through its pipeline; the paths are those of ``sim.pipeline``."""
    for wave, timing in enumerate(program.problem.timings):
        for place, knot in enumerate(program.knots):
            for name, terms, constant_s in _paths(program, wave, timing, place):
                program.at_most_s(
                    f"path_{name}_wave_{timing.sequences}_step_{knot}",
                    [],
                    [*terms, (program.step_s[wave][place], -1.0)],
                    -constant_s,
                )


def _paths(program: Program, wave: int, timing: Timing, place: int) -> list[tuple[str, list[Term], float]]:
    """Name, terms and constant of each path through the step at ``place`` (``sim.pipeline`` derives them)."""
    setting = program.problem.setting
    layers, depth = setting.model.layers, setting.prefetch_layers
    fetch, layer, write = program.fetch_s[wave][place], program.layer_s[wave][place], program.write_s[wave][place]
    query_s, head_s = (float(column[program.knots[place]]) for column in (timing.still.query_s, timing.still.head_s))
    launched: tuple[str, list[Term], float]
    launched = ("launched", [], layers * float(timing.still.launched_s[program.knots[place]]))
    behind = [(write, 1.0)] if program.knots[place] else []  # the prefill's is part of its layer
    trailing = [(write, float(layers))] if program.knots[place] else []
    if timing.prices.recalls:
        computed = [(layer, float(layers)), (fetch, float(layers))]
        first = [(layer, 1.0), (fetch, 1.0)]
        return [
            ("computed", computed, head_s),
            ("computed_written", [*computed, *behind], 0.0),
            ("written", [*first, *trailing], 0.0),
            launched,
        ]
    fetched = [(fetch, float(layers - depth)), (layer, 1.0)]
    ahead = program.following(program.fetch_s[wave], place, float(depth))
    return [
        ("computed", [(layer, float(layers))], head_s),
        ("computed_written", [(layer, float(layers)), *behind], 0.0),
        ("fetched", fetched, head_s - query_s),
        ("fetched_written", [*fetched, *behind], -query_s),
        ("written", [(layer, 1.0), *trailing], 0.0),
        ("computed_ahead", [(layer, float(layers - depth)), *ahead], 0.0),
        ("fetched_ahead", [(fetch, float(layers - depth)), *ahead], 0.0),
        launched,
    ]


def _kept_by_prefill(program: Program) -> tuple[list[Term], float]:
    """Tokens whose KV crosses to the host while the prefill runs, as terms and a constant.

    Those that leave HBM at once; all that are kept as KV, if they are written at birth.
    """
    setting, counts = program.problem.setting, counts_of(program.problem.setting)
    if setting.write_back is WriteBack.AT_BIRTH:
        return [(program.inputs[0], -1.0), (program.forward[0], -1.0)], float(counts.cached[0] - counts.dead[0])
    return [(program.kv[0], 1.0)], 0.0


def _duplex_s(timing: Timing, knot: int) -> float:
    """What a fetch loses to the write-back of one token beside it."""
    written = timing.d2h_bytes_by_written if knot else 0.0
    return timing.duplex_s_per_byte * written


def _recompute_pieces(program: Program, timing: Timing, knot: int) -> list[tuple[float, float]]:
    """Seconds of a layer's recomputation by tokens of one sequence."""
    problem = program.problem
    if knot == 0 or not (problem.uses_inputs or problem.uses_forward):
        return [(0.0, 0.0)]
    if problem.uses_forward:
        return list(timing.prices.forward.pieces)
    rows = float(timing.rows_by_inputs[knot])
    return [(constant_s, per_row_s * rows) for constant_s, per_row_s in timing.prices.reproject.pieces]
