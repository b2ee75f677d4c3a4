"""A wave's prefill as one CUDA graph: short prompts take the host longer to launch, kernel by kernel, than the GPU to compute.

What differs from wave to wave lies where the graph looks for it: the prompts here, all else in the wave's own tensors.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from runtime.graph.capturing import captured
from runtime.models import Decoder
from runtime.streams import warming_stream


class PromptGraph:
    """Of ``lanes`` prompts without padding; ``tokens`` [lane, token].

    Its memory is a pool of its own, as much as such a prefill takes anyway: whoever takes prompts in otherwise releases it
    before. How prompts are taken in is told with each call: this would else keep the wave, and the wave this.
    """

    def __init__(self, decoder: Decoder, lanes: int, prompt_tokens: int) -> None:
        self.decoder = decoder
        self.tokens = torch.zeros((lanes, prompt_tokens), dtype=torch.int64, device=decoder.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def take_in(self, tokens: Tensor, prefill: Callable[[Tensor], None]) -> None:
        """Prefill with ``tokens`` [lane, token]; where nothing is captured, operation by operation."""
        self.tokens.copy_(tokens)
        if self.graph is None:
            prefill(self.tokens)
        else:
            self.graph.replay()

    def capture(self, prefill: Callable[[Tensor], None]) -> None:
        """Run once, so that kernels are chosen, compiled and loaded, then capture; replay once, which takes the graph to the GPU.

        The slots' state is arbitrary afterwards. Without a GPU nothing is captured.
        """
        self.release()
        if self.decoder.device.type != "cuda":
            return
        stream = warming_stream(self.decoder.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            prefill(self.tokens)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what that run took: the graph takes as much, and none of it
            self.graph = self._captured(prefill)
            self.graph.replay()
        torch.cuda.current_stream().wait_stream(stream)

    def release(self) -> None:
        """Let the graph and its memory go: prompts are taken in operation by operation from here on."""
        self.graph = None

    def _captured(self, prefill: Callable[[Tensor], None]) -> torch.cuda.CUDAGraph:
        return captured(torch.cuda.graph_pool_handle(), partial(prefill, self.tokens))
