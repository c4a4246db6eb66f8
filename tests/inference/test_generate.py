"""Generation: against the trainer's own parts without a cache, alone and in batches, within and beyond the context."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from generation import STEPS, chain_of, generate, tokens
from mbit_kernels.decode import nearest_token
from transformers import GenerationConfig, TextStreamer

from megatron_bit.diffusion import noise
from megatron_bit.errors import UserError
from megatron_bit.inference.generate import Generator
from megatron_bit.inference.hf import bits_bitlm as hf_bits
from megatron_bit.inference.hf import chain_bitlm as hf_chain
from megatron_bit.inference.hf import generation_bitlm as hf_generation
from megatron_bit.inference.hf import head_bitlm as hf_head
from megatron_bit.inference.hf import noise_bitlm as hf_noise
from megatron_bit.inference.hf import settings_bitlm as hf_settings
from megatron_bit.model import kernels
from megatron_bit.model.chain import Before
from megatron_bit.model.head import Newest

NAMES = ["sharded_training", "k1", "k4", "odd", "seeing"]
CHAINS = ["chain", "chain_k1", "names", "memory"]
KEYS = ("prompt", "text", "tokens", "step")


def by_the_trainer(ours, prompt, count, seed, sequence, guidance=None):
    """New ids, computed again for every block with the parts that train. The context begins where it has to."""
    m, length = ours.config.model, ours.config.data.seq_length
    k, most = m.block_size, length // m.block_size
    ids = [0] * (-len(prompt) % k) + list(prompt)
    begin, first = len(ids), 0
    distribution = noise.NoiseDistribution.from_config(ours.config.diffusion)
    grid = distribution.log_sigma(torch.linspace(1.0, 0.0, STEPS).clamp(1e-6, 1 - 1e-6))
    while len(ids) < begin + count:
        blocks = len(ids) // k
        while blocks - first > most - 1:
            first += max(1, most // 2)
        window = torch.tensor([ids[first * k :] + [0] * k])
        hidden = ours.hidden(window)[0, -k:, None]
        z = grid[0].exp() * noise.gaussian(seed, noise.SAMPLING, torch.tensor([sequence]), blocks, 1, 1, k, m.bits)
        estimate = torch.zeros_like(z) if ours.config.diffusion.self_condition else None
        newest = None
        if m.token_before:  # the one before the block, in whatever context that is read
            bits = ours.model.codec.encode(torch.tensor([[ids[-1] if ids else 0]]))
            newest = Newest(ours.model.bit_groups.index(bits), torch.tensor([[blocks > 0]]))
        with torch.no_grad():
            for step, (now, after) in enumerate(zip(grid, [*grid[1:].tolist(), None], strict=True)):
                level = now.expand(1, 1, 1)
                outputs = ours.model.head.evaluate(z, level, hidden, estimate, newest=newest)
                if guidance is not None:
                    other = ours.model.head.evaluate(z, level, 0 * hidden, estimate, newest=newest)
                    outputs = (1 - guidance) * other + guidance * outputs
                odds = ours.model.posterior.logits(outputs, z, now.exp())
                x_hat = ours.model.posterior.mean(odds)
                estimate = None if estimate is None else x_hat  # of the step before
                if after is not None:
                    kept = (2.0 * (after - now)).exp()
                    place = (torch.tensor([sequence]), torch.tensor([[blocks]]))
                    fresh = hf_noise.gaussian(seed, hf_noise.SAMPLING, *place, 1, k, m.bits, step + 1)
                    fresh = fresh[0, 0].transpose(0, 1)[:, None]  # [K, b, M, B]
                    z = x_hat + kept * (z - x_hat) + math.exp(after) * (1.0 - kept).sqrt() * fresh
        ids += likeliest(ours.model, odds[:, 0, 0])
    return ids[begin : begin + count]


def likeliest(model, logits):
    """The likeliest ids of a block, from the log-odds of its bits [K, B] or the values of its groups [K, G, U]."""
    if logits.dim() == 2:
        return nearest_token(logits, model.codec.table).tolist()
    values = model.bit_groups.index(model.codec.table)
    scores = [sum(float(row[i, value]) for i, value in enumerate(code)) for row in logits for code in values.tolist()]
    return torch.tensor(scores).view(len(logits), -1).argmax(1).tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [0, 8, 50])
def test_cached_text_is_the_text_computed_again_for_every_block(name, length, generator, trainer):
    """From nothing, from a prompt of no whole number of blocks, and from one longer than the context; 2.5 contexts."""
    prompt = tokens(1, length)
    expected = by_the_trainer(trainer(name), prompt, 90, 9, 2**35 + 1)
    assert generate(generator(name), [prompt], 90, sequence_ids=[2**35 + 1]) == [expected]
    assert len(set(expected)) > 20


def gumbel_of_block(seed, sequence, block, k, groups, values):
    """float64 [K, G, U]: minus the logarithm of minus the logarithm of the words' uniforms, four words a counter."""
    elements = torch.arange(-(-k * groups * values // 4))
    words = hf_noise.uniforms(seed, hf_noise.SAMPLING, torch.tensor([sequence]), torch.tensor([[block]]), 1, elements)
    uniforms = torch.stack(words, -1).flatten()[: k * groups * values].double()
    return -torch.log(-torch.log(uniforms)).view(k, groups, values)


def of_the_head(head, rows, states):
    """Nats of values int64 [s, b, G] with states [s, 1, D]."""
    known = torch.arange(len(rows))[:, None].expand(rows.shape[:2])
    with torch.no_grad():
        states = states.expand(-1, rows.shape[1], -1)
        return head(rows, Before(rows.roll(1, 0), known > 0, None, head.remember(rows, known), None), states)


def by_the_chain(ours, prompt, count, seed, sequence, temperature, guidance=None):
    """The same for a chain: each group's probabilities from the nats of all its values, by the head that trains.

    Without a condition is the newest block alone, as in training.
    """
    m, length = ours.config.model, ours.config.data.seq_length
    k, most, sizes = m.block_size, length // m.block_size, m.group_sizes
    ids, first = [0] * (-len(prompt) % k) + list(prompt), 0
    begin, table = len(ids), ours.model.bit_groups.index(ours.model.codec.table)  # [V, G]
    while len(ids) < begin + count:
        blocks = len(ids) // k
        while blocks - first > most - 1:
            first += max(1, most // 2)
        gumbel = gumbel_of_block(seed, sequence, blocks, k, len(sizes), 2 ** max(sizes))
        window = ids[first * k :]
        hidden = ours.hidden(torch.tensor([window + [0] * k]))[0, :, None]
        free = torch.cat((hidden[:-k], torch.zeros_like(hidden[-k:])))
        for place in range(k):
            left, at = torch.ones(len(table), dtype=torch.bool), len(window)
            index = table[torch.tensor(window + [0] * (k - place))][:, None]  # [s, 1, G]
            for stage, size in enumerate(sizes):
                rows = index.repeat(1, 2**size, 1)
                rows[at, :, stage] = torch.arange(2**size)
                nats, other = (of_the_head(ours.model.head, rows, states) for states in (hidden, free))
                log_p = -nats[at, :, stage]
                if guidance is not None:
                    log_p = ((1 - guidance) * -other[at, :, stage] + guidance * log_p).log_softmax(-1)
                possible = torch.zeros(2**size, dtype=torch.bool).index_fill(0, table[left, stage], True)
                log_p = log_p.masked_fill(~possible, float("-inf"))
                keen = log_p / temperature + gumbel[place, stage, : 2**size] if temperature else log_p
                index[at, 0, stage] = keen.argmax()
                left &= table[:, stage] == index[at, 0, stage]
            window.append(int(left.nonzero()))
        ids += window[-k:]
    return ids[begin : begin + count]


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize(("length", "temperature"), [(0, 1.0), (8, 0.7), (50, 1.0), (8, 0.0)])
def test_a_chain_with_caches_draws_what_the_head_that_trains_says(name, length, temperature, generator, trainer):
    prompt = tokens(1, length)
    expected = by_the_chain(trainer(name), prompt, 60, 9, 2**35 + 1, temperature)
    how = {"steps": None, "temperature": temperature}
    assert generate(generator(name), [prompt], 60, sequence_ids=[2**35 + 1], **how) == [expected]
    assert len(set(expected)) > (20 if temperature else 1)


@pytest.mark.parametrize("name", CHAINS)
def test_rows_of_a_chain_are_what_they_are_alone(name, generator):
    prompts, how = [tokens(i, n) for i, n in enumerate((31, 3, 0, 38))], {"steps": None}
    together = generate(generator(name), prompts, 45, sequence_ids=[4, 5, 6, 7], **how)
    for i, prompt in enumerate(prompts):
        assert generate(generator(name), [prompt], 45, sequence_ids=[4 + i], **how) == [together[i]]


@pytest.mark.parametrize("guidance", [3.0, 0.0])
@pytest.mark.parametrize(("name", "length"), [("k4", 9), ("seeing", 9), ("chain", 8), ("chain", 0)])
def test_guidance_is_its_formula(name, length, guidance, generator, trainer):
    """With caches, against two evaluations of the head that trains; blocks within and beyond the context."""
    prompt, chain = tokens(1, length), name == "chain"
    how = {"steps": None, "temperature": 0.9} if chain else {}
    by, more = (by_the_chain, (0.9,)) if chain else (by_the_trainer, ())
    expected = by(trainer(name), prompt, 45, 9, 2**35 + 1, *more, guidance=guidance)
    plain = generate(generator(name), [prompt], 45, sequence_ids=[2**35 + 1], **how)
    both, how = [prompt, tokens(3, 14)], {"guidance": guidance, **how}
    guided = generate(generator(name), both, 45, sequence_ids=[2**35 + 1, 4], **how)
    assert guided[0] == expected != plain[0]


@pytest.mark.parametrize("name", ["k4", "groups", "seeing", "chain"])
def test_guidance_of_the_head_s_outputs_before_they_become_probabilities(name, generator, monkeypatch):
    """One block, its evaluations one by one: 1 is what it is without, and costs nothing; else there are two."""
    it, chain = generator(name), name == "chain"
    call, calls = ("groups" if chain else "forward"), []
    inner = getattr(it.model.head, call)
    monkeypatch.setattr(it.model.head, call, lambda *given: calls.append((given, inner(*given))) or calls[-1][1])
    k, how = it.model.config.block_size, {"steps": None, "ahead": 0} if chain else {}
    plain = generate(it, [tokens(2, k)], k, **how)
    once = len(calls)
    assert generate(it, [tokens(2, k)], k, guidance=1.0, **how) == plain and len(calls) == 2 * once
    calls.clear()
    generate(it, [tokens(2, k)], k, guidance=2.5, **how)
    if chain:
        calls = calls[len(it.model.config.group_sizes) :]  # the prompt's are not guided
    for (given, said), (other, without) in zip(calls[::2], calls[1::2], strict=True):
        assert torch.equal(given[1 if chain else 0], other[1 if chain else 0]) and given[2].any()
        assert not other[2].any() and (not chain or other[4] is None)
        assert not torch.equal(said, without)


def test_guidance_needs_a_model_that_was_trained_for_it(generator):
    for name, how in (("odd", {}), ("chain_k1", {"steps": None})):
        it = generator(name)
        assert generate(it, [[5]], 6, guidance=1.0, **how) == generate(it, [[5]], 6, **how)
        with pytest.raises(ValueError, match=r"guidance=3 needs a model trained with diffusion.condition_drop above 0"):
            generate(it, [[5]], 6, guidance=3.0, **how)
        it.check({"guidance": 1.0})
        with pytest.raises(UserError, match=r"^guidance 2.5 needs a model trained with diffusion.condition_drop"):
            it.check({"guidance": 2.5})
    generator("k4").check({"guidance": 2.5, "steps": 3})
    with pytest.raises(ValueError, match="guidance=-1"):
        generate(generator("k4"), [[5]], 4, guidance=-1)


def test_a_chain_has_temperature_and_no_steps(generator):
    with pytest.raises(ValueError, match="steps means nothing to a BitLM with a chain head"):
        generate(generator("chain"), [[5]], 4)
    with pytest.raises(ValueError, match="temperature=-1"):
        generate(generator("chain"), [[5]], 4, steps=None, temperature=-1)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_a_padded_batch_is_what_it_is_alone(name, generator):
    """The rows run into the end of the context at different times."""
    prompts = [tokens(2, 7), [], tokens(3, 30), tokens(4, 1), tokens(5, 61)]
    sequences = [5, 0, 2**40, 8, 9]
    together = generate(generator(name), prompts, 64, sequence_ids=sequences)
    for prompt, sequence, row in zip(prompts, sequences, together, strict=True):
        assert generate(generator(name), [prompt], 64, sequence_ids=[sequence]) == [row]
    other_seed = generate(generator(name), prompts, 64, sequence_ids=sequences, seed=10)
    other_sequence = generate(generator(name), prompts[:1], 64, sequence_ids=[6])
    assert together[0] not in (other_seed[0], other_sequence[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_score_of_a_padded_row_is_its_score_alone(side, generator):
    model, rows = generator("odd").model, [tokens(6, 5), tokens(7, 12), tokens(8, 9)]
    ids, mask = torch.full((3, 13), 99), torch.zeros(3, 13, dtype=torch.int64)
    places = [slice(13 - len(r), 13) if side == "left" else slice(0, len(r)) for r in rows]
    for row, (place, own) in enumerate(zip(places, rows, strict=True)):
        ids[row, place], mask[row, place] = torch.tensor(own), 1
    together = model.score(ids, mask, sequence_ids=[4, 5, 6])
    for row, (place, own) in enumerate(zip(places, rows, strict=True)):
        alone = model.score(torch.tensor([own]), sequence_ids=[4 + row])
        torch.testing.assert_close(together.nats[row : row + 1], alone.nats, rtol=1e-5, atol=0)
        torch.testing.assert_close(together.nats_per_token[row, place], alone.nats_per_token[0], rtol=1e-4, atol=1e-4)
        assert (together.nats_per_token[row][mask[row] == 0] == 0).all()
    with pytest.raises(ValueError, match="trained at"):
        model.score(torch.zeros(1, 37, dtype=torch.int64))


def test_the_end_of_a_row_and_the_length(generator):
    free = generate(generator("odd"), [[], tokens(2, 7)], 31)
    end = free[0][10]
    first = [row.index(end) if end in row else len(row) for row in free]
    ended = generate(generator("odd"), [[], tokens(2, 7)], 31, eos_token_id=end, pad_token_id=420)
    for row, expected, at in zip(ended, free, first, strict=True):
        assert row == expected[: at + 1] + [420] * (len(row) - at - 1)
    assert len(ended[0]) == min(31, max(first) + 1) and first[0] <= 10
    assert [len(row) for row in generate(generator("odd"), [[]], 2)] == [2], "less than a block"
    ids = torch.tensor([tokens(2, 7)])
    assert generator("odd").model.generate(ids, max_length=20, eos_token_id=[]).shape == (1, 20)
    own = GenerationConfig(max_new_tokens=4, steps=STEPS, eos_token_id=None)
    assert generator("odd").model.generate(ids, own).shape == (1, 11)


def test_stop_strings_end_a_row_where_they_appear(generator):
    """Also a string that no token holds alone."""
    it = generator("odd")
    (free,) = generate(it, [[]], 60)
    text = [it.text.decode([token]) for token in free]
    pairs = [(at, a + b) for at, (a, b) in enumerate(pairwise(text)) if a and b and (a + b).isascii()]
    at, stop = next((at, pair) for at, pair in pairs if at > 5 and pair not in it.text.decode(free[: at + 1]))
    (row,) = generate(it, [[]], 60, stop_strings=["never in it \u2603", stop], tokenizer=it.text)
    assert row == free[: at + 2]


@pytest.mark.parametrize("name", NAMES)
def test_states_with_a_cache_are_those_without(name, generator):
    """Block after block, in a batch with empty blocks in front: text alone would hide small differences."""
    model = generator(name).model
    k, most = model.config.block_size, model.config.max_position_embeddings // model.config.block_size
    ids, lead = torch.tensor([tokens(6, most * k), tokens(7, most * k)]), torch.tensor([0, 2])
    context = hf_generation.Context(model.model, lead.tolist(), most)
    with torch.no_grad():
        expected = model._states(ids[:, : (most - 1) * k], lead)
        for blocks in range(3, most):
            state, _ = context.advance(ids[:, : blocks * k])
            torch.testing.assert_close(state[:, -k:], expected[:, blocks * k : (blocks + 1) * k], rtol=0, atol=2e-6)


def test_streamers_get_what_is_returned(generator, capsys):
    it = generator("k4")
    ids = torch.tensor([tokens(2, 6)])
    out = it.model.generate(ids, max_new_tokens=22, steps=STEPS, streamer=TextStreamer(it.text), eos_token_id=[])
    assert capsys.readouterr().out == it.text.decode(out[0].tolist()) + "\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"temperature": 0.5}, "temperature means nothing"),
        ({"num_beams": 4}, "num_beams"),
        ({"generation_config": GenerationConfig(top_k=7)}, "top_k"),
        ({"sampler": "sde"}, "choose one of ode"),
        ({"steps": 1}, "at least 2"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"stop_strings": ["x"]}, "tokenizer"),
        ({"sequence_ids": [1, 2]}, "one number for each of 1 rows"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.int64)}, "once"),
    ],
)
def test_what_means_nothing_is_refused(arguments, words, generator):
    with pytest.raises(ValueError, match=words):
        generator("odd").model.generate(torch.zeros(1, 3, dtype=torch.int64), **arguments)


# prompt, block; head, of a chain for each group
@pytest.mark.parametrize(
    ("name", "most", "backend"),
    [
        ("k4", 3, "eager"),
        ("k4", 3, "aot_eager"),
        ("chain", 6, "eager"),
        ("chain", 6, "aot_eager"),
        ("memory", 6, "eager"),
    ],
)
def test_backbone_pass_and_head_compile_as_one_graph_each(name, most, backend, generator):
    model = generator(name).model
    how = {} if name == "k4" else {"steps": None}
    expected = generate(generator(name), [tokens(2, 7), []], 24, **how)
    torch._dynamo.reset()
    try:
        model.compile_parts(backend=backend, fullgraph=True)
        torch._dynamo.utils.counters.clear()
        assert generate(generator(name), [tokens(2, 7), []], 24, **how) == expected
        counters = torch._dynamo.utils.counters
        assert not counters["graph_break"]
        assert 3 <= counters["stats"]["unique_graphs"] <= most
    finally:
        for part, method in ((model.model, "forward"), (model.head, "forward"), (model.head, "groups")):
            part.__dict__.pop(method, None)


def test_compiled_means_the_backbone_and_the_head(converted, generator, monkeypatch):
    """What they are compiled to is torch's (by hand: the same texts); here, that they are and how."""
    said = []
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: said.append((f.__name__, how)) or plain(f, backend="eager"))
    compiled = Generator(converted["chain"].folder, compiled=True)
    assert said == [("forward", {}), ("groups", {})]
    how = {"max_tokens": 12, "streamer": None, "seed": 3}
    rows = [tokens(2, 7), tokens(1, 3)]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled.run(rows, **how) == generator("chain").run(rows, **how)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    monkeypatch.setattr(kernels, "_compiler", lambda: False)
    with pytest.raises(UserError, match=r"--compile is not possible here: .* there is none on PATH; leave it out"):
        Generator(converted["chain"].folder, compiled=True)


def test_commands(converted, tmp_path):
    """Both kinds of source, a file of prompts, batches, JSON."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("class A:\nx = \n")
    options = ["--prompt", "def f", "--prompt-file", str(prompts), "--max-tokens", "20", "--steps", "4", "--json"]
    code = "import sys; from megatron_bit import cli; cli.main()"
    for source, more in ((converted["odd"].run, []), (converted["odd"].folder, ["--batch-size", "3"])):
        command = [sys.executable, "-P", "-c", code, "generate", str(source), *options, *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        results = [json.loads(line) for line in done.stdout.splitlines()]
        expected = Generator(source).generate(["def f", "class A:", "x = "], 20, steps=4)
        for result, other in zip(results, expected, strict=True):
            assert [result[key] for key in KEYS] == [other[key] for key in KEYS]
            assert result["tokens_per_second"] > 0 and 0 < result["seconds_to_first_block"] <= result["seconds"]


SHAPES = [
    {"vocab_size": 300, "bits": 9, "group_sizes": [5, 4], "block_size": 4, "head_window": 3},
    {"vocab_size": 256, "bits": 8, "group_sizes": [8], "block_size": 6, "head_window": 8},  # every code is a token
    {"vocab_size": 37, "bits": 7, "block_size": 3, "head_window": 1, "head_prior": False},  # groups of one bit
    {"vocab_size": 37, "bits": 7, "group_sizes": [4, 3], "block_size": 1, "head_window": 5, "head_num_layers": 2},
    {"vocab_size": 0, "bits": 19, "group_sizes": [7, 6, 6], "block_size": 2, "head_window": 4},
    {"vocab_size": 37, "bits": 7, "group_sizes": [4, 3], "block_size": 3, "head_window": 2, "memory_rows": 50},
]


@pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda shape: f"V{shape['vocab_size']}-K{shape['block_size']}-{shape.get('memory_rows', 0)}"
)
@pytest.mark.parametrize("rows", [1, 3])
def test_text_does_not_depend_on_how_many_tokens_are_guessed_ahead(shape, rows, monkeypatch):
    """One group after another, against all numbers of tokens at once; 18 ways to draw, and two contexts."""
    k, groups = shape["block_size"], len(shape.get("group_sizes", [1] * shape["bits"]))
    evaluations, inner, saved = [], hf_head.BitLMHead.groups, 0
    monkeypatch.setattr(hf_head.BitLMHead, "groups", lambda *given: evaluations.append(1) or inner(*given))
    for seed in range(3):
        model = chain_of(seed, **shape)
        given = torch.randint(0, shape["vocab_size"] or 256, (rows, 2 * k))
        if not shape["vocab_size"]:
            given = hf_bits.pack(torch.randn(rows, 2 * k, shape["bits"]))
        ends = {"eos_token_id": []} if shape["vocab_size"] else {}
        for temperature, guidance in ((1.0, 1.0), (0.6, 1.0), (0.1, 1.0), (0.0, 1.0), (1.0, 2.5), (0.0, 0.5)):
            how = {"max_new_tokens": 10 * k, "seed": seed, "temperature": temperature, "guidance": guidance, **ends}
            evaluations.clear()
            expected = model.generate(given, ahead=0, **how)
            once = len(evaluations)
            for ahead in sorted({1, 2, k}):
                evaluations.clear()
                assert torch.equal(model.generate(given, ahead=ahead, **how), expected), (seed, how, ahead)
                assert len(evaluations) <= once
                saved += once - len(evaluations)
    assert saved > 0 or k * groups == 1


def test_ahead_of_what_is_not_a_number_of_tokens(generator):
    with pytest.raises(ValueError, match="ahead=-2 has to be 0"):
        generate(generator("chain"), [[5]], 6, steps=None, ahead=-2)
    with pytest.raises(ValueError, match="ahead means nothing"):
        generate(generator("k4"), [[5]], 6, ahead=2)


def test_draws_have_their_probabilities():
    """First groups of 20,000 sequences against what the head says of them."""
    model = chain_of(3, **SHAPES[0])
    count = 20_000
    settings = hf_settings.Settings.read(
        None, {"seed": 4, "temperature": 0.7, "max_new_tokens": 1}, 0, None, "chain", False
    )
    noise = hf_chain.gumbel(settings, model.config, torch.arange(count), torch.zeros(count, dtype=torch.int64))
    log_p = torch.randn(32, generator=torch.Generator().manual_seed(0)).mul(2).log_softmax(-1)
    drawn = hf_chain.draw(log_p.expand(count, 4, 2, 32), noise, 0.7)
    for place in (0, 3):
        for group in (0, 1):
            expected = (log_p / 0.7).softmax(-1) * count
            found = torch.bincount(drawn[:, place, group], minlength=32)
            assert ((found - expected).square() / expected).sum() < 31 + 5 * (2 * 31) ** 0.5


@pytest.mark.parametrize("name", ["k4", "odd"])
def test_decoding_takes_the_form_that_was_measured(name, generator, monkeypatch):
    """Of single bits; a form that the table does not name changes nothing."""
    ours, calls = generator(name), []
    wanted = generate(ours, [tokens(1, 8), tokens(2, 3)], 12)
    winner = {"winner": "compiled", "sizes": {}}
    monkeypatch.setattr("mbit_kernels.choice.measurements", lambda: {"cpu": {"nearest_token": winner}})

    def fast(operation, form):
        calls.append((operation, form))
        return lambda logits, table: calls.append(len(logits)) or nearest_token(logits, table)

    monkeypatch.setattr("megatron_bit.inference.generate.function", fast)
    try:
        ours.bind_decoding()
        assert generate(ours, [tokens(1, 8), tokens(2, 3)], 12) == wanted
        if ours.model.posterior.groups:
            assert calls == []
        else:
            assert calls[0] == ("nearest_token", "compiled") and calls[1:] and set(calls[1:]) == {2}
    finally:
        vars(ours.model.posterior).pop("nearest_token", None)
