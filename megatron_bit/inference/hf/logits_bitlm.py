"""The next token's log-probabilities, of all V tokens, out of a chain's conditionals of groups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone_bitlm import BitLMModel, rope
from .bits_bitlm import group_values
from .chain_bitlm import Chain
from .embedding_bitlm import begun_keys, look_up
from .head_bitlm import BitLMHead, HeadCache, HeadSight

PREFIXES, ROWS = 256, 4096  # evaluated together: beginnings of codes of a token, and these times tokens


class NextTokens(Chain):
    """A chain head that tells all tokens apart: group g of a token is asked behind every beginning of g groups that
    some token's code has, which is a tree of at most V inner nodes; a token's log-probability is the sum along its way.
    """

    def __init__(self, head: BitLMHead, backbone: BitLMModel) -> None:
        super().__init__(head, backbone)
        assert self.codes is not None, "records have no ids"
        self.ids = self.codes.ids
        sizes = head.config.group_sizes
        self.ordered = group_values(head.config, backbone.code_table[self.ids])  # int64 [V, G], codes ascending
        begun = [self.codes.codes >> sum(sizes[g:]) for g in range(len(sizes))]
        self.begins = [torch.unique_consecutive(codes, return_inverse=True)[1] for codes in begun]  # [V], of group g

    def log_p(self, ids: Tensor, states: Tensor, at: Tensor) -> Tensor:
        """Log-probabilities float32 [b, s, V] of the tokens at positions `at`, given those before them.

        Codes that no token has keep what the chain gives them: where V < 2^B the sum over V is a little below 1.

        Args:
            ids: int64 [b, n K] from a beginning; of the tokens from `at` on nothing enters.
            states: [b, n K, D], that condition them.
            at: int64 [b, s].
        """
        device = ids.device
        text = self._written(ids, states, torch.arange(ids.shape[1], device=device).expand(ids.shape))
        out = torch.zeros(at.numel(), len(self.ordered), device=device)
        row = torch.arange(len(ids), device=device)[:, None].expand(at.shape).flatten()
        for i, (log_p, own) in enumerate(self._each_group(text)):
            if i == 0:  # behind nothing: what reading has said
                out += log_p[row, at.flatten()][:, self.ordered[:, 0]]
                continue
            edges = F.pad(self.begins[i].bincount().cumsum(0), (1, 0)).tolist()
            count = len(edges) - 1
            step = max(1, ROWS // min(count, PREFIXES))
            for first in range(0, len(row), step):
                here = slice(first, first + step)
                where = (row[here], at.flatten()[here])
                asked = [None if t is None else t[where][:, None] for t in (text.context, text.prior, text.tie)]
                before = self._begun(text.values, *where)
                for low in range(0, count, PREFIXES):
                    high = min(count, low + PREFIXES)
                    tokens = slice(edges[low], edges[high])
                    prefix = self.ordered[edges[low:high]]
                    found = self._behind(i, prefix, *where, asked, before, own)
                    picked = (self.begins[i][tokens] - low, self.ordered[tokens, i])
                    out[here, tokens] += found[:, picked[0], picked[1]]
        return torch.empty_like(out).index_copy_(1, self.ids, out).view(*at.shape, -1)

    def _begun(self, values: Tensor, row: Tensor, at: Tensor) -> Tensor:
        """The tokens before N tokens, as far as the head has to know them, int64 [N, reach, G]."""
        back = at[:, None] - torch.arange(self.reach, 0, -1, device=at.device)
        return values[row[:, None], back.clamp(min=0)] * (back >= 0)[..., None]

    def _behind(
        self,
        stage: int,
        prefix: Tensor,
        row: Tensor,
        at: Tensor,
        asked: list[Tensor | None],
        before: Tensor,
        real: HeadCache,
    ) -> Tensor:
        """Log-probabilities of one group behind P beginnings of a token, for N tokens: float32 [N, P, U].

        Each is a row of its own that sees itself, and the tokens before as they are.

        Args:
            prefix: int64 [P, G], of which the first `stage` groups count.
            row, at: int64 [N], where the tokens are.
            asked: condition, prior and tie of each, [N, 1, ...].
            before: int64 [N, reach, G].
            real: keys and values of this group of all tokens.
        """
        head, config, (p, n) = self.head, self.config, (len(prefix), len(row))
        context, prior, tied = asked
        assert context is not None
        first = self._known(torch.zeros_like(before[:, -1:]), before, at[:, None])[0]  # [N, 1, W], of group 0
        known = first + look_up(head.values, prefix)[:, :stage].sum(1)
        if head.inner_memory is not None:
            begun = begun_keys(prefix)[:, stage - 1].expand(n, 1, p)
            known = known + head.inner_memory(begun_keys(before)[..., -1], at[:, None], begun)[:, 0]
        tie = head.tie(tied, prefix[None])
        back = at[:, None] - torch.arange(config.head_window - 1, 0, -1, device=at.device)  # [N, window - 1]
        past = [
            t[:, 0].movedim(3, 2)[:, row[:, None], back.clamp(min=0)].movedim(2, 3) for t in (real.keys, real.values)
        ]
        keys, content = (torch.cat((t, t.new_zeros(*t.shape[:3], p, t.shape[4])), dim=3)[:, None] for t in past)
        itself = torch.eye(p, dtype=torch.bool, device=at.device).expand(n, p, p)
        mask = torch.cat(((back >= 0)[:, None].expand(n, p, -1), itself), dim=-1)[:, None]
        turn = rope(at[:, None], keys.shape[-1], config.rope_theta, context.dtype)
        slots = torch.arange(p, device=at.device) + back.shape[1]
        own = slice(stage, stage + 1)
        return head.groups(
            own, known[None], context, head.modulations(context, own), prior, None if tie is None else tie[own],
            at[:, None] % config.block_size, HeadSight(*turn, mask, slots), keys, content,
        )[0]  # fmt: skip
