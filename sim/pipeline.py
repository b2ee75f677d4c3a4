"""How long a step takes: its layers as a pipeline over the GPU stream and both copy engines, in closed form.

The contract that engine and runtime keep. A step ends when all three streams have ended (one graph a step). Layer l's
attention starts when its queries are known and its fetch has arrived; its write-back starts when the layer has ended,
that of a prefill is the layer's end: the next one waits for it.
A ring of depth + 1 buffers holds fetched layers: the fetch for layer l + depth starts when layer l - 1 has ended, the
last ``depth`` of a step are for the first layers of the next one. Where part of a fetch is known only after the query
(recall), that part goes first and the guess for the next layer follows it, so depth is 1.
"""

import numpy as np

from sim.counts import Column
from sim.layer import LayerTimes


def step_seconds(times: LayerTimes, layers: int, depth: int) -> Column:
    """Duration of each step, [step]."""
    return seconds_before(times, _next_step(times.prefetch_s), layers, depth)


def seconds_before(times: LayerTimes, ahead_s: Column, layers: int, depth: int) -> Column:
    """Duration of steps, each followed by one that fetches for ``ahead_s`` a layer.

    No step ends before the host has launched all its layers.

    With c GPU seconds of a layer, f of its fetch, f' of the next step's, w of its write-back, L layers and depth D,
    identical layers leave these paths through a step, the longest of which it takes:

    - all layers computed, L c, or the fetches of this step and the last layer's attention, (L - D) f + attend + rest;
      behind either the head or the last write-back
    - the first layer, then all write-backs: c + L w; a prefill's are part of its c, and its w is 0
    - this step's fetches, as fast as fetch or buffers allow, then the next step's first: (L - D) max(c, f) + D f'
    """
    after_fetch_s = times.layer_s - times.query_s
    slower_s = np.maximum(times.layer_s, times.prefetch_s)
    launched_s = layers * times.launched_s
    if times.recalls:
        recalled_s: Column = np.maximum(_with_recall(times, layers, slower_s, ahead_s), launched_s)
        return recalled_s
    computed_s: Column = np.maximum(layers * times.layer_s, (layers - depth) * times.prefetch_s + after_fetch_s)
    ended_s = np.maximum(computed_s + np.maximum(times.head_s, times.write_s), times.layer_s + layers * times.write_s)
    ended_s = np.maximum(ended_s, launched_s)
    step_s: Column = np.maximum(ended_s, (layers - depth) * slower_s + depth * ahead_s)
    return step_s


def _with_recall(times: LayerTimes, layers: int, slower_s: Column, ahead_s: Column) -> Column:
    """A slot a layer, from attention to attention: the slower of computing and guessing ahead, then the correction."""
    last_attention_s = times.query_s + layers * times.correct_s + (layers - 1) * slower_s
    after_fetch_s = times.layer_s - times.query_s
    computed_s = last_attention_s + after_fetch_s
    first_layer_s = times.layer_s + times.correct_s
    ended_s = np.maximum(computed_s + np.maximum(times.head_s, times.write_s), first_layer_s + layers * times.write_s)
    step_s: Column = np.maximum(ended_s, last_attention_s + ahead_s)
    return step_s


def fill_seconds(times: LayerTimes, depth: int) -> float:
    """Before a wave's first step: its first layers' fetch (streamed weights), which nothing hides."""
    return ring_depth(times, depth) * float(times.prefetch_s[0])


def ring_depth(times: LayerTimes, depth: int) -> int:
    """How many layers ahead fetches are: one where part of each is known only after its query."""
    return 1 if times.recalls else depth


def _next_step(per_step: Column) -> Column:
    following = np.zeros_like(per_step)
    following[:-1] = per_step[1:]
    return following
