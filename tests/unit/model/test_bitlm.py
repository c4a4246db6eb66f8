"""What a position may know, and what the training graph may hold."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_bit.model.chunk import TokenBatch
from megatron_bit.optim.groups import parameter_groups

VOCAB_SIZE = 1999


@pytest.mark.parametrize("attention", ["causal", "block_causal"])
@pytest.mark.parametrize(("block_size", "blocks"), [(1, 13), (3, 7), (4, 7)])
def test_a_hidden_state_knows_earlier_blocks_only(make_config, make_model, block_size, blocks, attention):
    """Changing token p changes the states from p + K on (block-causal: from the start of the next block), no others.

    Every state from there on changes: a model that saw less than it may would fail here too.
    """
    config = make_config(block_size, blocks, f"model.attention={attention}")
    model = make_model(config)
    length = config.data.seq_length
    tokens = torch.randint(0, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model.hidden(tokens)
        for position in range(length):
            changed = tokens.clone()
            changed[0, position] ^= 0b101
            moved = (model.hidden(changed) != before).any(dim=-1).any(dim=-1)
            first = position + block_size
            if attention == "block_causal":
                first = first // block_size * block_size
            assert moved.tolist() == [p >= first for p in range(length)], position
            assert not moved[: (position // block_size + 1) * block_size].any()


def test_each_sample_is_alone(make_config, make_model):
    config = make_config(3, 5)
    model = make_model(config)
    tokens = torch.randint(0, VOCAB_SIZE, (3, 15), generator=torch.Generator().manual_seed(1))
    sample = torch.tensor([4, 2**40 + 1, 9])
    with torch.no_grad():
        together = model(TokenBatch(tokens, sample)).metrics
        alone = torch.stack([model(TokenBatch(tokens[i : i + 1], sample[i : i + 1])).metrics for i in range(3)])
        renumbered = model(TokenBatch(tokens, sample + 1)).metrics
    torch.testing.assert_close(together, alone.mean(0), rtol=1e-5, atol=0)  # of training: loss and bound
    model.eval()
    with torch.no_grad():  # of validation: one for each sample
        together = model(TokenBatch(tokens, sample)).per_sample
        alone = torch.cat([model(TokenBatch(tokens[i : i + 1], sample[i : i + 1])).per_sample for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    assert together.shape == (3,) and together.unique().numel() == 3
    model.train()
    with torch.no_grad():
        together = model(TokenBatch(tokens, sample)).metrics
    assert not torch.allclose(renumbered, together, rtol=1e-4), "the noise does not depend on the sample"


def test_the_last_block_takes_part_in_the_loss_only(make_config, make_model):
    """Tokens of the last block are targets and never inputs; a wrong shift would feed them."""
    config = make_config(4, 5)
    model = make_model(config)
    tokens = torch.randint(0, VOCAB_SIZE, (2, 20))
    changed = tokens.clone()
    changed[:, -4:] ^= 1
    with torch.no_grad():
        assert torch.equal(model.hidden(changed), model.hidden(tokens))
        sample = torch.arange(2)
        assert model(TokenBatch(changed, sample)).loss != model(TokenBatch(tokens, sample)).loss


class _Shapes(TorchDispatchMode):
    """Collects tensors with a dimension of `size`, other than those that share the storage of `allowed`."""

    def __init__(self, size: int, allowed: torch.Tensor) -> None:
        super().__init__()
        self.size, self.allowed, self.found, self.seen = size, allowed.untyped_storage().data_ptr(), [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.seen += 1
                if self.size in leaf.shape and leaf.untyped_storage().data_ptr() != self.allowed:
                    self.found.append((str(func), tuple(leaf.shape), leaf.dtype))
        return out


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_no_tensor_of_vocabulary_size(make_config, make_model, loss):
    """In the graph and among parameters and gradients nothing grows with V (a prime, so no shape has it by chance)."""
    vocab_size = 4093
    config = make_config(3, 5, "model.bits=12", f"diffusion.loss={loss}")
    model = make_model(config, vocab_size)
    table = model.codec.table
    assert table.dtype == torch.int8 and table.shape == (vocab_size, 12)
    tokens = torch.randint(0, vocab_size, (2, 15))
    with _Shapes(vocab_size, table) as shapes:
        model(TokenBatch(tokens, torch.arange(2))).loss.backward()
        assert shapes.seen > 500 and shapes.found == []
        table.float()  # the watch does see one
        assert len(shapes.found) == 1
    for name, parameter in model.named_parameters():
        assert vocab_size not in parameter.shape and vocab_size not in parameter.grad.shape, name
        assert parameter.grad.norm() > 0, name
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in make_model(config, 1000).parameters()
    )  # the size of the model does not know V


def test_what_decays_in_the_real_model(make_config, make_model):
    """Norms, biases and learned positions do not, everything else does; the head has its own learning rate."""
    config = make_config(3, 5, "optim.head_lr_scale=0.5")
    model = make_model(config)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups([model], config)
    assert len(groups) == 4
    for group in groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            kept = name.endswith(("norm.weight", ".bias")) or name in ("embedding.start", "head.position")
            assert (group["weight_decay"] == 0) == kept, name
            assert group["lr_scale"] == (0.5 if name.startswith("head.") else 1.0), name
    assert not names
