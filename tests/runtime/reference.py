"""Sparse attention by masking full attention, token by token in plain Python: what every selector must equal."""

import torch
from torch import Tensor

from runtime.models import Decoder
from sim.attention import PAGE_TOKENS, Selector
from sim.plan import Setting


class Masked:
    """One sequence, all its keys and values kept; ``pad`` positions before its prompt count as tokens and are none.

    With ``forced`` tokens and picks [decode step, layer, group] it goes the way of another run, whose rounding differs;
    picks are not looked at under dense attention. It goes ``steps`` steps, None: all of the plan's.
    """

    def __init__(
        self,
        setting: Setting,
        decoder: Decoder,
        prompt: list[int],
        *,
        per_head: bool = False,
        forced: tuple[tuple[int, ...], list[list[list[tuple[int, ...]]]]] | None = None,
        steps: int | None = None,
    ) -> None:
        self.forced = forced
        self.setting, self.decoder, self.prompt = setting, decoder, prompt
        self.counts, self.spec = setting.token_counts, decoder.spec
        self.steps = len(self.counts.cached) if steps is None else steps
        self.pad = self.counts.cached[0] - len(prompt)
        self.groups = [[head] for head in range(self.spec.kv_heads)] if per_head else [[*range(self.spec.kv_heads)]]
        self.picks: list[list[list[tuple[int, ...]]]] = []  # [decode step, layer, group]

    def run(self) -> tuple[list[int], Tensor]:
        """Greedy tokens and logits [step, vocab]."""
        device, pad, spec = self.decoder.device, self.pad, self.spec
        tokens = torch.tensor([[0] * pad + self.prompt], device=device)
        positions = (torch.arange(tokens.shape[1], device=device) - pad).clamp(min=0)[None]
        x = self.decoder.embed(tokens, positions)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.lanes: list[list[_Lane]] = []
        for layer in range(spec.layers):
            q, k, v = self.decoder.project(layer, x, positions)
            weights = self._weights(q, k)  # [head, query, key]
            self.lanes.append([_Lane(self, group, weights) for group in self.groups])
            self.keys.append(k)
            self.values.append(v)
            x = self.decoder.finish(layer, x, self._mix(weights, v))
        logits = [self.decoder.logits(x)[0, -1]]
        for row in range(1, self.steps):
            token = self.forced[0][row - 1] if self.forced else int(logits[-1].argmax())
            logits.append(self._step(row, token))
        return [int(row.argmax()) for row in logits], torch.stack(logits)

    def _step(self, row: int, token: int) -> Tensor:
        device, spec = self.decoder.device, self.spec
        positions = torch.tensor([[self.counts.cached[row] - 1 - self.pad]], device=device)
        x = self.decoder.embed(torch.tensor([[token]], device=device), positions)
        picked = []
        for layer in range(spec.layers):
            q, k, v = self.decoder.project(layer, x, positions)
            self.keys[layer] = torch.cat((self.keys[layer], k), 1)
            self.values[layer] = torch.cat((self.values[layer], v), 1)
            allowed = torch.zeros(spec.heads, self.counts.cached[row], dtype=torch.bool, device=device)
            share = spec.heads // spec.kv_heads
            for place, lane in enumerate(self.lanes[layer]):
                attended = lane.attended(row, q, self.keys[layer])
                if self.forced and not self.setting.attention.is_dense:
                    attended = set(self.forced[1][row - 1][layer][place]) | lane.local(row)
                for head in lane.heads:
                    allowed[head * share : (head + 1) * share, sorted(attended)] = True
            allowed[:, : self.pad] = False
            weights = self._weights(q, self.keys[layer], allowed)
            for lane in self.lanes[layer]:
                lane.observe(row, weights[:, 0])
            picked.append([tuple(sorted(lane.picked)) for lane in self.lanes[layer]])
            x = self.decoder.finish(layer, x, self._mix(weights, self.values[layer]))
        self.picks.append(picked)
        return self.decoder.logits(x)[0, -1]

    def _weights(self, q: Tensor, k: Tensor, allowed: Tensor | None = None) -> Tensor:
        share = self.spec.heads // self.spec.kv_heads
        scores = torch.einsum("qhc,khc->hqk", q[0], k[0].repeat_interleave(share, 1)).float() * self.spec.head_dim**-0.5
        at = torch.arange(k.shape[1], device=k.device)
        queries = at[-q.shape[1] :, None]
        visible = (at <= queries) & ((at >= self.pad) | (at == queries))
        if allowed is not None:
            visible = visible & allowed[:, None]
        return scores.masked_fill(~visible, -torch.inf).softmax(-1)

    def _mix(self, weights: Tensor, v: Tensor) -> Tensor:
        share = self.spec.heads // self.spec.kv_heads
        return torch.einsum("hqk,khc->qhc", weights.to(v.dtype), v[0].repeat_interleave(share, 1))[None]


class _Lane:
    """What one layer attends to, for some of its key heads together."""

    def __init__(self, run: Masked, heads: list[int], weights: Tensor) -> None:
        self.run, self.heads, self.counts = run, heads, run.counts
        share = run.spec.heads // run.spec.kv_heads
        self.query_heads = [head * share + one for head in heads for one in range(share)]
        self.selector = run.setting.attention.selector
        n = self.counts.cached[0]
        queries = weights[self.query_heads].sum(0)  # [query, key]
        queries[: run.pad] = 0.0
        self.asked = [dict(enumerate(row.tolist())) for row in queries]
        self.alive = set(range(n))
        self.last = dict.fromkeys(range(n), -1)
        self.picked: set[int] = set()
        if not self.selector.recalls:
            self._start()

    def _start(self) -> None:
        """The first step's picks are known before anything dies."""
        counts = self.counts
        for token in self.local(0):
            self.last[token] = 0
        older = {token for token in self.alive if token < counts.cached[0] - counts.local[0]}
        living = self._best(0, older, counts.cached[0] - counts.dead[0] - counts.local[0])
        self.picked = set()
        if len(counts.cached) > 1:
            leavers = self.local(0) - self.local(1)
            self.picked = self._best(1, living | leavers, counts.selected[1])
            for token in self.picked | self.local(1):
                self.last[token] = 1
        self._bury(0)
        if len(counts.cached) > 1:
            self.alive.add(counts.cached[1] - 1)
            self._bury(1)

    def attended(self, row: int, q: Tensor, keys: Tensor) -> set[int]:
        counts = self.counts
        if self.selector.recalls:
            self.alive.add(counts.cached[row] - 1)
            older = {token for token in self.alive if token < counts.cached[row] - counts.local[row]}
            self.picked = self._recalled(older, counts.selected[row], q, keys)
        elif row > 1:
            older = {token for token in self.alive if token < counts.cached[row] - counts.local[row]}
            self.picked = self._best(row, older, counts.selected[row])
            self.alive.add(counts.cached[row] - 1)
            for token in self.picked | self.local(row):
                self.last[token] = row
            self._bury(row)
        return self.picked | self.local(row)

    def observe(self, row: int, weights: Tensor) -> None:
        paid = weights[self.query_heads].sum(0).tolist()
        attended = self.picked | self.local(row)
        self.asked.append({token: paid[token] for token in attended})

    def local(self, row: int) -> set[int]:
        cached = self.counts.cached[row]
        return set(range(cached - self.counts.local[row], cached))

    def _bury(self, row: int) -> None:
        already = self.counts.dead[row - 1] if row else 0
        for _ in range(self.counts.dead[row] - already):
            self.alive.remove(min(self.alive, key=lambda token: (self.last.get(token, 10**9), token)))

    def _best(self, row: int, older: set[int], count: int) -> set[int]:
        if self.selector is Selector.DENSE:
            return older
        if self.selector is Selector.LOCAL:
            return set()
        if self.selector is Selector.STRIDED:
            return self._strided(row, sorted(older), count)
        queries = self.asked
        if self.selector is Selector.SWA:
            recent = self.run.setting.attention.history_steps(self.counts.cached[row])
            queries = queries[-recent:]
        paid = {token: sum(query.get(token, 0.0) for query in queries) for token in older}
        return self._top(paid, count)

    def _top(self, scores: dict[int, float], count: int) -> set[int]:
        order = sorted(
            scores, key=lambda token: (token < self.run.pad, 0.0 if token < self.run.pad else -scores[token], token)
        )
        return set(order[:count])

    def _strided(self, row: int, older: list[int], count: int) -> set[int]:
        if row and self.counts.dead[row]:
            while len(older) > count:  # thin out where neighbours are closest
                far = 10**6
                ends = [-far, *older, far * 2]
                gaps = {token: ends[place + 2] - ends[place] for place, token in enumerate(older)}
                wanted = self._top({token: float(gap) for token, gap in gaps.items()}, count)
                older = [token for token in older if token in wanted]
            return set(older)
        parts = self.counts.selected[row]
        middles = {(2 * part + 1) * len(older) // (2 * parts) for part in range(parts)} if parts else set()
        scores = {token: float(place in middles) for place, token in enumerate(older)}
        return self._top(scores, count)

    def _recalled(self, older: set[int], count: int, q: Tensor, keys: Tensor) -> set[int]:
        share, spec = self.run.spec.heads // self.run.spec.kv_heads, self.run.spec
        real = range(self.run.pad, keys.shape[1])
        total = dict.fromkeys(older, 0.0)
        for head in self.query_heads:
            query, key = q[0, 0, head].float(), keys[0, :, head // share].float()
            if self.selector is Selector.TOPK:
                shares = (key[self.run.pad :] @ query * spec.head_dim**-0.5).softmax(0).tolist()
                for token, weight in zip(real, shares, strict=True):
                    if token in total:
                        total[token] += weight
                continue
            pages = sorted({token // PAGE_TOKENS for token in real})
            bounds = []
            for page in pages:
                inside = key[[token for token in real if token // PAGE_TOKENS == page]]
                low, high = inside.min(0).values, inside.max(0).values
                bounds.append(float(torch.maximum(query * low, query * high).sum()) * spec.head_dim**-0.5)
            for page, weight in zip(pages, torch.tensor(bounds).softmax(0).tolist(), strict=True):
                for token in total:
                    if token // PAGE_TOKENS == page:
                        total[token] += weight
        return self._top(total, count)
