"""What HBM holds besides the KV cache, and the KV budget that is left."""

from functools import lru_cache

from sim.spec import DType, MachineSpec, ModelSpec, WeightFormat, weight_bytes_per_parameter

PREFILL_CHUNK_TOKENS = 8192  # rows that one pass of the prefill takes through a layer; more gain nothing on any card
_FEW_BYTES = 2**25  # of HBM


def prefill_rows(sequences: int, prompt_tokens: int) -> int:
    """Rows of one prefill pass: whole sequences, as many as fit the chunk, at least one."""
    return prompt_tokens * min(sequences, max(1, PREFILL_CHUNK_TOKENS // prompt_tokens))


def prefills_at_once(sequences: int, prompt_tokens: int) -> bool:
    """Whether one pass takes all prompts through a layer, and none of them in parts."""
    return sequences * prompt_tokens <= PREFILL_CHUNK_TOKENS


def workspace_bytes(
    model: ModelSpec, dtype: DType, sequences: int, prompt_tokens: int, weights_on_host: float = 0.0
) -> int:
    """Activations of the widest moment: the feed-forward of a prefill pass (in chunks), and float32 logits of each sequence.

    The layer's input, its output so far, its norm and what it adds are there then, query, key and value, rotated ones
    besides them, and what attention gave. Weights that are streamed cross the link once for all passes: those prompts that do
    not pass hold their layer's input, or its output.
    """
    rows = max(sequences, prefill_rows(sequences, prompt_tokens))
    waiting = (sequences * prompt_tokens - prefill_rows(sequences, prompt_tokens)) if weights_on_host else 0
    return (
        activation_bytes(model, dtype, rows) + waiting * model.hidden * dtype.size_bytes + sequences * model.vocab * 4
    )


def activation_bytes(model: ModelSpec, dtype: DType, rows: int) -> int:
    """Of a pass of so many ``rows`` through a layer."""
    rotated = 0 if model.positions and not model.qk_norm else model.query_dim + model.kv_dim
    attention_row = 2 * model.hidden + model.query_dim + 2 * model.kv_dim + rotated
    return (rows * attention_row + _gone_entries(model, rows)) * dtype.size_bytes


def _gone_entries(model: ModelSpec, rows: int) -> int:
    """Of a pass's feed-forward, what has gone when the layer ends: what attention gave, the norm, what is added, and what lies
    between the matrices, of long prompts in chunks.
    """
    mlp_row = model.intermediate * (2 if model.gated_mlp else 1)
    return rows * (2 * model.hidden + model.query_dim) + min(rows, PREFILL_CHUNK_TOKENS) * mlp_row


def weighed_at_once(model: ModelSpec, dtype: DType, lanes: int, tokens: int, queries: int) -> tuple[int, int]:
    """Lanes, and queries of each, whose weights over a pass's ``tokens`` are worked out together for a first choice of what
    to attend to: as many as find room where the feed-forward was, or in a little that is worth no more launches.

    A query pays a token, head by head, twice in float32: what softmax reads, and what it gives.
    """
    room = max(_FEW_BYTES, _gone_entries(model, lanes * tokens) * dtype.size_bytes)
    most = max(1, room // (2 * 4 * model.heads * tokens))  # queries, of all lanes
    return (min(lanes, most // queries), queries) if queries <= most else (1, most)


@lru_cache(maxsize=256)
def resident_weight_bytes(model: ModelSpec, dtype: DType, weight_format: WeightFormat, on_host: float) -> int:
    """Weights in HBM; where a share of each layer is streamed, two layers' worth of it is buffered, and what lacks of the matrix
    that it ends in. Matrices stored in fewer bits are widened one after the other, in room for the largest.
    """
    total = model.weight_bytes(dtype, weight_format)
    streamed = on_host * layer_weight_bytes(model, dtype, weight_format)
    room = 0 if weight_format is WeightFormat.NATIVE else largest_matrix_entries(model) * dtype.size_bytes
    buffer = streamed + cut_matrix_bytes(model, dtype, weight_format, on_host)
    return round(total - model.layers * streamed + min(2, model.layers) * buffer) + room


def cut_matrix_bytes(model: ModelSpec, dtype: DType, weight_format: WeightFormat, on_host: float) -> float:
    """Of the matrix in which a layer's share ``on_host`` ends, what stays in HBM. Matrices are taken in order, norms aside."""
    up = model.hidden * model.intermediate * (2 if model.gated_mlp else 1)
    matrices = (model.qkv_parameters, model.out_parameters, up, model.mlp_parameters - up)
    left = on_host * layer_weight_bytes(model, dtype, weight_format)
    for size in (count * weight_bytes_per_parameter(dtype, weight_format) for count in matrices):
        if left < size:
            return size - left if left > 0 else 0.0
        left -= size
    return 0.0


def largest_matrix_entries(model: ModelSpec) -> int:
    """Of a layer's: queries, keys and values are one, gate and up another."""
    return model.hidden * max(model.query_dim + 2 * model.kv_dim, model.intermediate * (2 if model.gated_mlp else 1))


@lru_cache(maxsize=256)
def layer_weight_bytes(model: ModelSpec, dtype: DType, weight_format: WeightFormat) -> float:
    """Stored bytes of one decoder layer."""
    rest = model.weight_bytes(dtype) - model.layers * model.layer_parameters * dtype.size_bytes
    return (model.weight_bytes(dtype, weight_format) - rest) / model.layers


def kv_budget_bytes(
    machine: MachineSpec,
    model: ModelSpec,
    dtype: DType,
    *,
    sequences: int,
    prompt_tokens: int,
    reserve_bytes: int,
    weight_format: WeightFormat = WeightFormat.NATIVE,
    weights_on_host: float = 0.0,
) -> int:
    """HBM left for all that grows with cached tokens. Negative: that many bytes are missing for the rest alone."""
    weights = resident_weight_bytes(model, dtype, weight_format, weights_on_host)
    workspace = workspace_bytes(model, dtype, sequences, prompt_tokens, weights_on_host)
    return machine.gpu.hbm_bytes - reserve_bytes - weights - workspace
