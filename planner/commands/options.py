"""Options that several commands share. All values are text; ``planner.inputs`` reads and checks them."""

from typing import Annotated

import typer

_MACHINE = "Machine"
_WORK = "Model and work"
_ALLOWED = "What the plan may do"
_ANSWER = "Answer"

Gpu = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE",
        help="GPU: a name from `planner gpus`, or a .toml file with the same keys as the catalogue.",
        rich_help_panel=_MACHINE,
    ),
]
Host = Annotated[str, typer.Option(metavar="NAME", help="Host, from `planner hosts`.", rich_help_panel=_MACHINE)]
HbmGib = Annotated[
    str | None,
    typer.Option(metavar="GIB", help="HBM in GiB, instead of the GPU's own.", rich_help_panel=_MACHINE),
]
HostGib = Annotated[
    str | None,
    typer.Option(metavar="GIB", help="Host memory in GiB, instead of the host's own.", rich_help_panel=_MACHINE),
]
LinkGbS = Annotated[
    str | None,
    typer.Option(
        metavar="GB/S",
        help="Datasheet rate of the host link, GB/s in each direction, instead of the GPU's own.",
        rich_help_panel=_MACHINE,
    ),
]
KvBudgetGib = Annotated[
    str | None,
    typer.Option(
        metavar="GIB", help="HBM for KV in GiB, instead of what weights and workspace leave.", rich_help_panel=_MACHINE
    ),
]
Profile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|nominal",
        help="What the machine delivers: a file that `planner calibrate` wrote, or nominal.",
        show_default="measured where the card has been, else nominal",
        rich_help_panel=_MACHINE,
    ),
]
Model = Annotated[
    str,
    typer.Option(
        metavar="NAME|PATH",
        help="Model: a name from `planner models`, or a Hugging Face config.json or a folder that holds one.",
        rich_help_panel=_WORK,
    ),
]
Batch = Annotated[str, typer.Option(metavar="N", help="Sequences to generate.", rich_help_panel=_WORK)]
Prompt = Annotated[str, typer.Option(metavar="TOKENS", help="Prompt tokens of each sequence.", rich_help_panel=_WORK)]
Output = Annotated[str, typer.Option(metavar="TOKENS", help="Tokens to generate for each.", rich_help_panel=_WORK)]
Dtype = Annotated[
    str, typer.Option(metavar="fp16|bf16|fp32", help="What the model computes in.", rich_help_panel=_WORK)
]
WeightFormat = Annotated[
    str,
    typer.Option(metavar="native|int8|int4", help="How the weights are stored.", rich_help_panel=_WORK),
]
Sparsity = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE",
        help="Most of the cached tokens that attention may leave out, from 0 (none) to below 1. Changes the output.",
        show_default="0.8",
        rich_help_panel=_ALLOWED,
    ),
]
Selectors = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME,...",
        help="Rules that may pick the attended tokens: swa, h2o, local, strided, pages, topk. Dense always may.",
        show_default="swa",
        rich_help_panel=_ALLOWED,
    ),
]
KvFormats = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME,...",
        help="How KV may be stored: native, fp8 (where the GPU has it), int8, int4. Native always may.",
        show_default="native,int8",
        rich_help_panel=_ALLOWED,
    ),
]
Lossless = Annotated[
    bool, typer.Option("--lossless", help="Only what leaves the output unchanged.", rich_help_panel=_ALLOWED)
]
Concurrency = Annotated[
    str,
    typer.Option(
        metavar="auto|all|N", help="Sequences that run at once; the rest waits its turn.", rich_help_panel=_ALLOWED
    ),
]
Objective = Annotated[
    str,
    typer.Option(
        metavar="throughput|tpot|ttft",
        help="What is best: tokens a second, time per output token, or time to the first one.",
        rich_help_panel=_ALLOWED,
    ),
]
MaxTpotMs = Annotated[
    str | None,
    typer.Option(metavar="MS", help="Longest mean time per output token, ms.", rich_help_panel=_ALLOWED),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.", rich_help_panel=_ANSWER)]
OutputFile = Annotated[
    str | None,
    typer.Option(
        "--out", "-o", metavar="FILE", help="Write the plan to this file as JSON as well.", rich_help_panel=_ANSWER
    ),
]
