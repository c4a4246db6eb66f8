"""`generate`: texts a block at a time, with keys and values of what was read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from .backbone_bitlm import BitLMModel, BlockCache
from .bits_bitlm import fill_front, group_values, pack
from .chain_bitlm import Chain, guide
from .configuration_bitlm import BitLMConfig
from .embedding_bitlm import reach_of
from .front_bitlm import Front
from .head_bitlm import BitLMHead
from .noise_bitlm import SAMPLERS, SAMPLING, NoiseDistribution, gaussian
from .posterior_bitlm import Posterior
from .settings_bitlm import NO_FRONT, UNGUIDED, Settings
from .text_bitlm import TextStream
from .tokenwise_bitlm import Tokenwise


class Row:
    """Whether a row goes on."""

    def __init__(self, settings: Settings, prompt: list[int]) -> None:
        self.settings, self.open = settings, True
        self.text = None
        if settings.decoder is not None:
            self.text = TextStream(settings.decoder, prompt, settings.stop_strings)

    def take(self, token: int) -> int:
        """The token, or padding behind the end of the row."""
        s = self.settings
        if not self.open:
            return s.pad
        if token in s.eos:
            self.open = False
        elif self.text is not None:
            self.text.add(token)
            self.open = not self.text.ended
        return token


class Context:
    """What the backbone has read of each row, and its cache.

    Where a row's context begins depends on how long its text is, and on nothing else: not on the batch, and not on
    which part of it was a prompt.
    """

    def __init__(self, backbone: BitLMModel, lead: list[int], blocks: int) -> None:
        config = backbone.config
        self.backbone, self.lead = backbone, lead
        self.k, self.most = config.block_size, config.max_position_embeddings // config.block_size
        self.reach = reach_of(config) - 1
        self.begin: list[int] | None = None
        size = min(blocks, self.most)  # the start vectors and all blocks but the last: as many as there are blocks
        self.cache = BlockCache(config, len(lead), size, backbone.norm.weight)

    def window(self, blocks: int) -> int:
        """First block that is context of the next one, for a text of so many blocks."""
        hop = max(1, self.most // 2)
        return max(0, -(-(blocks - self.most + 1) // hop)) * hop

    def advance(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [b, n K], longer by one block each time.

        Returns:
            states [b, s, D] and the positions int64 [b, s] in the context of the tokens that they condition: of the
            block to come (s = K), or where the context begins anew of all of it.
        """
        k, blocks = self.k, tokens.shape[1] // self.k
        begin = [lead + self.window(blocks - lead) for lead in self.lead]
        before = None
        if begin == self.begin:
            inputs, slot = tokens[:, -k:], (blocks - min(begin)) * k
            if self.reach:  # as many every time: one graph
                before = fill_front(tokens, self.reach, 0)[:, -k - self.reach : -k]
        else:
            self.begin = begin
            self.cache.clear()
            inputs, slot = fill_front(tokens[:, min(begin) * k :], k, 0), 0
        slots = torch.arange(slot, slot + inputs.shape[1], device=tokens.device)
        empty = torch.tensor(begin, device=tokens.device)[:, None] - min(begin)
        position = slots - empty * k
        return self.backbone(inputs, position, self.cache, slots, before), position


class BitLMGenerationMixin(GenerationMixin):
    """What generates, of a model with these parts."""

    config: BitLMConfig
    model: BitLMModel
    head: BitLMHead
    noise: NoiseDistribution
    posterior: Posterior
    device: torch.device

    def check_generation(self, generation_config: GenerationConfig, tokenizer: Any = None) -> None:
        """ValueError or TypeError for what `generate` would not take of a GenerationConfig."""
        self._settings(generation_config, {}, 0, tokenizer)

    def _settings(self, base: GenerationConfig | None, kwargs: dict[str, Any], given: int, tokenizer: Any) -> Settings:
        kind, records = self.config.head_kind, not self.config.vocab_size
        settings = Settings.read(base, kwargs, given, tokenizer, kind, records)
        if settings.guidance != 1.0 and not self.config.condition_drop:
            raise ValueError(f"generate: guidance={settings.guidance:g} {UNGUIDED}")
        if settings.overlap:
            self._check_front("generate", settings.overlap)
        return settings

    def _check_front(self, what: str, overlap: float) -> None:
        if not self.config.noisy_blocks:
            raise ValueError(f"{what}: overlap={overlap:g} {NO_FRONT}")
        if not overlap >= 1.0:
            raise ValueError(f"{what}: overlap={overlap:g} has to be 1 or above, or inf")

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        tokenizer: Any = None,
        sequence_ids: Tensor | Sequence[int] | None = None,
        stopping_criteria: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Continue texts, a block of K tokens at a time; every row is what it would be alone.

        A prompt is filled up in front to whole blocks with end-of-document tokens. While a text is not longer than the
        model was trained for, all of it is context. After that the context is moved on by half of that length whenever
        it is full, and read again.

        Args:
            inputs, input_ids: int64 [b, S], S may be 0; the same under two names, as in transformers.
            generation_config: instead of the model's own; keyword arguments win over it.
            attention_mask: [b, S], 0 where a row has no token (prompts of different lengths).
            streamer: gets the prompt and then tokens, as transformers' streamers expect it.
            tokenizer: needed for `stop_strings`.
            sequence_ids: int64 [b], keys of the noise; default 0, 1, ... The same (seed, sequence) gives the same text.
            stopping_criteria: transformers' own, a list of them or one; asked after every token, without scores.
            kwargs: max_new_tokens or max_length, eos_token_id, pad_token_id, stop_strings (looked for in the new text;
                records have no end), num_return_sequences, seed (default: a fresh one of torch's generator, so that
                torch.manual_seed decides it); of a diffusion head steps (at least 2) and sampler (a key of SAMPLERS),
                of a chain temperature and ahead (tokens of which all groups are guessed and checked at once; default
                0: one group after another. The text does not depend on it, but for rounding); of one that has learned
                from noisy blocks also overlap (default 0: none; 1 and above: a front of noise over so many groups; inf:
                all of a block together) and steps (evaluations of the head a block; default: as many as it has groups).
                guidance (default 1): unconditional + guidance * (conditional - unconditional) of the head's outputs,
                at the price of a second evaluation of the head where it is not 1. Unconditional is the head without
                the backbone's states of the block that is being drawn, as training had it (condition_drop); a chain
                goes on seeing the newest tokens, those of earlier blocks with their conditions.

                Of a chain over tokens do_sample=False (the likeliest token), top_k, top_p, repetition_penalty and
                min_new_tokens: drawn token after token from `forward`'s logits, at their price.

        Returns:
            int64 [b * num_return_sequences, S + new]: the given ids and the new ones; what follows a row's end is
                pad_token_id.

        Raises:
            ValueError: an argument that means nothing here (sampling temperature, beams, ...), a wrong value, or
                guidance of a model that was trained without condition_drop.
        """
        if (inputs is None) == (input_ids is None):
            raise ValueError("generate: give the prompt once, as `inputs` or as `input_ids`")
        given = inputs if input_ids is None else input_ids
        assert given is not None
        settings = self._settings(generation_config or self.generation_config, kwargs, given.shape[1], tokenizer)
        k, device = self.config.block_size, self.device
        if settings.copies > 1:
            given = given.repeat_interleave(settings.copies, dim=0)
            if attention_mask is not None:
                attention_mask = attention_mask.repeat_interleave(settings.copies, dim=0)
        tokens, lead = self._blocks(given.to(device), attention_mask)
        sequence = self._sequences(sequence_ids, len(given))
        if streamer is not None:
            streamer.put(given.cpu())
        rows = [Row(settings, prompt) for prompt in self._prompts(given, attention_mask, settings)]
        context = Context(self.model, lead.tolist(), tokens.shape[1] // k + -(-settings.max_new_tokens // k))
        chain = None
        if self.config.head_kind == "chain":
            if settings.tokenwise:
                own = torch.full((len(given),), given.shape[1]) if attention_mask is None else attention_mask.sum(1)
                first = tokens.shape[1] - own.to(device)
                chain = Tokenwise(self.head, self.model, settings, first, tokens.shape[1])
            else:
                chain = (Front if settings.overlap else Chain)(self.head, self.model)
        made: list[Tensor] = []  # columns of new tokens
        while len(made) < settings.max_new_tokens and any(row.open for row in rows):
            states, position = context.advance(tokens)
            index = tokens.shape[1] // k - lead
            if chain is not None:
                block = chain.advance(tokens, states, position, settings, sequence, index)
            else:
                own = states[:, -k:].contiguous()  # one layout: one graph
                newest = self._values_before(fill_front(tokens[:, -1:], 1, 0)[:, -1:], index[:, None] > 0)
                block = self._denoise(own, newest, settings, sequence, index)
            tokens = torch.cat((tokens, block), dim=1)
            for column in block.transpose(0, 1).cpu():
                if len(made) < settings.max_new_tokens and any(row.open for row in rows):
                    if self.config.vocab_size:
                        taken = [row.take(token) for row, token in zip(rows, column.tolist(), strict=True)]
                        column = torch.tensor(taken)
                    made.append(column)
                    if stopping_criteria:
                        so_far = torch.cat((given, torch.stack(made, dim=1).to(given.device)), dim=1)
                        for row, ends in zip(rows, _ends(stopping_criteria, so_far), strict=True):
                            row.open = row.open and not ends
                    if streamer is not None:
                        streamer.put(column)
        if streamer is not None:
            streamer.end()
        return torch.cat((given, torch.stack(made, dim=1).to(given.device)), dim=1)

    def _denoise(
        self, hidden: Tensor, newest: Tensor | None, settings: Settings, sequence: Tensor, block: Tensor
    ) -> Tensor:
        """hidden [b, K, D], sequence and index of the block in its text [b] to ids int64 [b, K]."""
        k, bits = self.config.block_size, self.config.bits
        states, grid = hidden[:, None], self.noise.grid(settings.steps, hidden.device)

        def noise(i: int) -> Tensor:
            return gaussian(settings.seed, SAMPLING, sequence, block[:, None], 1, k, bits, i)

        estimate = torch.zeros_like(noise(0)) if self.config.self_condition else None  # of the evaluation before

        def logits(z: Tensor, log_sigma: Tensor) -> Tensor:
            level = log_sigma.expand(len(z), 1, 1)
            outputs = self.head(z, level, states, estimate, newest)
            if settings.guidance != 1.0:
                other = self.head(z, level, torch.zeros_like(states), estimate, newest)
                outputs = guide(outputs, other, settings.guidance)
            return self.posterior.logits(outputs, z, log_sigma.exp())

        def denoised(z: Tensor, log_sigma: Tensor) -> Tensor:
            nonlocal estimate
            mean = self.posterior.mean(logits(z, log_sigma))
            estimate = mean if self.config.self_condition else None
            return mean

        z = SAMPLERS[settings.sampler](denoised, noise, grid)
        final = logits(z, grid[-1])[:, 0, 0]
        if not self.config.vocab_size:
            return pack(self.posterior.likeliest(final))
        return self.posterior.nearest_token(final, self.model.code_table)

    def _values_before(self, tokens: Tensor, known: Tensor) -> Tensor | None:
        """Of the tokens before n blocks, ids [b, n], where there is one, bool [b, n]: int64 [b, n, G] for the head, -1
        where there is none; None for a head that does not look."""
        if not self.config.token_before:
            return None
        return group_values(self.config, self.model.bits(tokens)).masked_fill(~known[..., None], -1)

    def _blocks(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows moved to the right and filled up in front to whole blocks: ids [b, n K], empty blocks in front [b]."""
        k, fill = self.config.block_size, self._eos() if self.config.vocab_size else 0
        length = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
        if attention_mask is not None:
            mask = attention_mask.to(input_ids.device).bool()
            order = mask.int().argsort(dim=1, stable=True)
            rest = (1,) * (input_ids.dim() - 2)
            missing = ~mask.gather(1, order).view(*order.shape, *rest)
            input_ids = input_ids.gather(1, order.view(*order.shape, *rest).expand_as(input_ids))
            input_ids = input_ids.masked_fill(missing, fill)
            length = mask.sum(1)
        blocks = -(-length // k)
        width = int(blocks.max()) * k if len(blocks) else 0
        ids = fill_front(input_ids, width - input_ids.shape[1], fill)
        return ids, width // k - blocks

    def _sequences(self, sequence_ids: Tensor | Sequence[int] | None, rows: int) -> Tensor:
        values = torch.as_tensor(range(rows) if sequence_ids is None else sequence_ids, dtype=torch.int64)
        if values.shape != (rows,):
            raise ValueError(f"sequence_ids of shape {tuple(values.shape)}: give one number for each of {rows} rows")
        return values.to(self.device)

    def _prompts(self, given: Tensor, attention_mask: Tensor | None, settings: Settings) -> list[list[int]]:
        """The ids of each row, if stop strings are looked for: what a new token's text is depends on them."""
        if not settings.stop_strings:
            return [[] for _ in given]
        rows, mask = given.tolist(), torch.ones_like(given) if attention_mask is None else attention_mask
        return [list(itertools.compress(row, here)) for row, here in zip(rows, mask.tolist(), strict=True)]

    def _eos(self) -> int:
        eos = self.generation_config.eos_token_id if self.generation_config is not None else None
        if eos is None:
            raise ValueError("generation_config.eos_token_id is not set; texts are filled up with it to whole blocks")
        return eos[0] if isinstance(eos, list) else eos


def _ends(criteria: Any, ids: Tensor) -> list[bool]:
    """What stopping criteria say of the rows [b, S]."""
    found = [torch.as_tensor(one(ids, None)) for one in (criteria if isinstance(criteria, list) else [criteria])]
    return torch.stack([one.to("cpu").bool().expand(len(ids)) for one in found]).any(0).tolist()
