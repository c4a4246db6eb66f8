"""With data.document_boundaries=mask a document is alone in its sample: nothing of another one reaches it."""

import pytest
import torch

from megatron_bit.data.documents import document_starts
from megatron_bit.model.build import build_model
from megatron_bit.model.chain import ChainLM
from megatron_bit.model.chunk import TokenBatch

EOS = 0
KINDS = {
    "chain": ["model.head.kind=chain", "model.head.window=4", "model.group_bits=4"],
    "wide chain": ["model.head.kind=chain", "model.head.window=50", "model.group_bits=10", "model.head.prior=false"],
    "block-causal chain": ["model.head.kind=chain", "model.attention=block_causal"],
    "diffusion": ["model.head.kind=diffusion"],
    "block-causal diffusion": ["model.head.kind=diffusion", "model.attention=block_causal"],
}


def packed(lengths, block_size, seed=1):
    """One sample of documents with these lengths, each filled up to whole blocks: tokens [1, S], document [S]."""
    generator = torch.Generator().manual_seed(seed)
    tokens, document = [], []
    for number, length in enumerate(lengths):
        whole = -(-length // block_size) * block_size
        ids = torch.full((whole,), EOS)
        ids[: length - 1] = torch.randint(1, 1024, (length - 1,), generator=generator)
        tokens.append(ids)
        document += [number] * whole
    return torch.cat(tokens)[None], torch.tensor(document)


def batch(tokens, block_size):
    starts = torch.from_numpy(document_starts(tokens.numpy(), EOS, block_size))
    return TokenBatch(tokens, torch.arange(len(tokens)), starts)


def rows(model, data):
    """What the model makes of every token: its state, and of a chain its nats. [S, ...]"""
    hidden = model.hidden(data.tokens, None, data.start)
    return model._evaluate(hidden, data).sum(-1) if isinstance(model, ChainLM) else hidden[:, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("block_size", "lengths"), [(1, (4, 1, 7)), (3, (4, 2, 9, 3)), (4, (8, 5))])
def test_a_changed_token_changes_its_own_document_alone(make_config, make_model, block_size, lengths, kind):
    """And there all that it may: a model that saw less would fail too."""
    tokens, document = packed(lengths, block_size)
    blocks = len(document) // block_size
    mask = ["data.document_boundaries=mask", "data.align_blocks=true"]
    model = make_model(make_config(block_size, blocks, *KINDS[kind], *mask))
    plain = make_model(make_config(block_size, blocks, *KINDS[kind]))
    data = batch(tokens, block_size)
    assert (data.start[0] == torch.tensor([document.tolist().index(d) for d in document.tolist()])).all()
    with torch.no_grad():
        before, reached = rows(model, data), False
        for position in torch.nonzero(tokens[0] != EOS).flatten().tolist():
            changed = tokens.clone()
            changed[0, position] ^= 0b100000001
            moved = (rows(model, batch(changed, block_size)) != before).flatten(1).any(1)
            seen = torch.arange(len(document)) >= position
            if "chain" not in kind:  # states are of the blocks behind
                first = position + block_size
                first -= first % block_size if "block" in kind else 0
                seen = torch.arange(len(document)) >= first
            assert moved.tolist() == (seen & (document == document[position])).tolist(), position
            without = rows(plain, TokenBatch(changed, data.sample)) != rows(plain, TokenBatch(tokens, data.sample))
            reached |= bool((without.flatten(1).any(1) & (document != document[position])).any())
        assert reached, "documents never reached each other: the test is empty"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", [1, 4])
def test_a_document_is_what_it_is_alone(make_config, make_model, block_size, kind):
    """In the middle of a sample as at its beginning: positions, start vectors and the token before are its own."""
    tokens, document = packed((6, 11), block_size)
    mask = ["data.document_boundaries=mask", "data.align_blocks=true"]
    model = make_model(make_config(block_size, len(document) // block_size, *KINDS[kind], *mask))
    second = tokens[:, document == 1]
    with torch.no_grad():
        together, alone = rows(model, batch(tokens, block_size)), rows(model, batch(second, block_size))
    torch.testing.assert_close(together[document == 1], alone, rtol=1e-5, atol=1e-6)


def test_the_softmax_peer_too(make_config, groups):
    config = make_config(
        1, 17, "model.head.kind=softmax", "data.document_boundaries=mask", "model.vocab_size=1024"
    )  # fmt: skip
    (model,) = build_model(config, 1024, groups, eos_id=EOS)
    tokens, document = packed((6, 11), 1)
    changed = tokens.clone()
    changed[0, :5] = torch.tensor([7, 8, 9, 10, 11])
    with torch.no_grad():
        states = [model.hidden(t, None, batch(t, 1).start)[:, 0] for t in (tokens, changed, tokens[:, document == 1])]
    assert torch.equal(states[0][document == 1], states[1][document == 1])
    torch.testing.assert_close(states[0][document == 1], states[2], rtol=1e-5, atol=1e-6)
    assert not torch.equal(states[0][1:6], states[1][1:6])


def test_positions_begin_anew_and_nothing_is_hidden(make_config, make_model):
    """A document that begins inside a block restarts with the next one, so that no block knows its own inside."""
    model = make_model(make_config(3, 5, "model.head.kind=chain", "data.document_boundaries=positions"))
    plain = make_model(make_config(3, 5, "model.head.kind=chain"))
    tokens = torch.randint(1, 1024, (1, 15), generator=torch.Generator().manual_seed(3))
    tokens[0, 4] = EOS
    data = batch(tokens, 3)
    assert data.start[0].tolist() == [0] * 6 + [6] * 9
    changed = tokens.clone()
    changed[0, 0] ^= 1
    with torch.no_grad():
        hidden, without = rows(model, data), rows(plain, TokenBatch(tokens, data.sample))
        assert (rows(model, batch(changed, 3)) != hidden).all()
        assert torch.equal(hidden[:6], without[:6])
        assert (hidden[6:] != without[6:]).any()
