"""Against the others: throughput of every policy, those that change the output in another figure than those that do not."""

from collections.abc import Sequence

import plotly.graph_objects as go

from reports.chart import Chart, Table
from reports.figures.shared import figure, room_for_text
from reports.look import BLUE, GREY, ORANGE, axis, plain
from reports.study import Rival

OUTCOME_COLUMNS = (
    "tokens_per_s",
    "ttft_s",
    "tpot_s",
    "makespan_s",
    "peak_hbm_bytes",
    "peak_host_bytes",
    "h2d_bytes",
    "d2h_bytes",
)


def rival_charts(rivals: Sequence[Rival]) -> tuple[Chart, ...]:
    """Lossless ones, then those that are not; a policy that does not fit is in the group that it would belong to."""
    groups = (
        ("rivals-lossless", "Policies that leave the output unchanged", True, BLUE),
        ("rivals-lossy", "Policies that change the output", False, ORANGE),
    )
    found = (
        (name, about, [one for one in rivals if one.lossless is kept], colour) for name, about, kept, colour in groups
    )
    return tuple(_bars(name, about, ranked(some), colour) for name, about, some, colour in found if some)


def ranked(rivals: Sequence[Rival]) -> list[Rival]:
    """Fastest first, what does not fit last."""
    return sorted(rivals, key=speed, reverse=True)


def speed(rival: Rival) -> float:
    """Tokens a second, 0 where there is no plan."""
    return rival.outcome.tokens_per_s if rival.outcome else 0.0


def _bars(name: str, about: str, rivals: list[Rival], colour: str) -> Chart:
    fastest = max(map(speed, rivals)) or 1.0
    bars = go.Bar(
        x=[speed(one) for one in rivals],
        y=[_name(one) for one in rivals],
        orientation="h",
        marker={"color": [colour if one.policy.startswith("optimum") else GREY for one in rivals]},
        text=[_label(one) for one in rivals],
        textposition="outside",
        cliponaxis=False,
        hovertext=[plain(one.reason or one.given_up or "lossless") for one in rivals],
        hovertemplate="%{y}: %{x:,.4~g} tokens/s<br>%{hovertext}<extra></extra>",
    )
    layout = {
        "xaxis": axis("throughput, tokens/s", range=[0, 1.2 * fastest]),
        "meta": room_for_text(fastest, 70 if all(one.outcome for one in rivals) else 95),
        "yaxis": axis("", autorange="reversed"),
        "hovermode": "closest",
        "bargap": 0.3,
    }
    return Chart(
        name=name,
        figure=figure([bars], 90 + (48 if any(one.given_up for one in rivals) else 34) * len(rivals), **layout),
        key=(),
        table=rival_table(rivals),
        about=about,
    )


def rival_table(rivals: Sequence[Rival]) -> Table:
    """Every figure of every policy, in SI units."""
    figures = {column: [getattr(one.outcome, column, None) for one in rivals] for column in OUTCOME_COLUMNS}
    return Table.of(
        {
            "policy": [one.policy for one in rivals],
            "lossless": [one.lossless for one in rivals],
            "changes": [one.given_up for one in rivals],
            **figures,
            "reason": [one.reason for one in rivals],
        }
    )


def _label(rival: Rival) -> str:
    if rival.outcome is None:
        return "does not fit"
    return f"{rival.outcome.tokens_per_s:,.0f}"


def _name(rival: Rival) -> str:
    """The policy, and below it what it gives up."""
    given_up = f"<br><i>{plain(rival.given_up)}</i>" if rival.given_up else ""
    return f"{plain(rival.policy)}{given_up}"
