"""``planner compare``."""

from planner.commands import options
from planner.inputs import Question, request_of
from planner.terminal import patiently, show, show_json

EPILOG = """\
[bold]Examples[/bold]

  planner compare

  planner compare --gpu v100-16g --model opt-6.7b --batch 32 --link-gb-s 20

  planner compare --gpu h100 --model llama-3-8b --prompt 8000 --json

Ratios are of throughput: lossless plans against the best lossless one, the others against the best of all.
"""

_DEFAULT = Question()


def compare(
    gpu: options.Gpu = _DEFAULT.gpu,
    host: options.Host = _DEFAULT.host,
    hbm_gib: options.HbmGib = None,
    host_gib: options.HostGib = None,
    link_gb_s: options.LinkGbS = None,
    profile: options.Profile = None,
    kv_budget_gib: options.KvBudgetGib = None,
    model: options.Model = _DEFAULT.model,
    batch: options.Batch = _DEFAULT.batch,
    prompt: options.Prompt = _DEFAULT.prompt,
    output: options.Output = _DEFAULT.output,
    dtype: options.Dtype = _DEFAULT.dtype,
    weight_format: options.WeightFormat = _DEFAULT.weight_format,
    sparsity: options.Sparsity = None,
    selector: options.Selectors = None,
    kv_formats: options.KvFormats = None,
    as_json: options.Json = False,
) -> None:
    """Compare the optimum with published systems, each as a plan that the same engine prices."""
    question = Question(
        gpu=gpu,
        host=host,
        hbm_gib=hbm_gib,
        host_gib=host_gib,
        link_gb_s=link_gb_s,
        profile=profile,
        kv_budget_gib=kv_budget_gib,
        model=model,
        batch=batch,
        prompt=prompt,
        output=output,
        dtype=dtype,
        weight_format=weight_format,
        sparsity=sparsity,
        selector=tuple(selector or ()),
        kv_formats=tuple(kv_formats or ()),
    )
    request = request_of(question)
    from planner.compare import compare as played
    from planner.compare import row_to_json

    with patiently("comparing"):
        rows = played(request)
    if as_json:
        show_json([row_to_json(row) for row in rows])
        return
    from planner.comparison import comparison

    show(comparison(rows, request))
