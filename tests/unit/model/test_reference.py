"""The model against an independent implementation of the same formulas: loss, bound and every gradient."""

from dataclasses import replace

import pytest
import torch

from megatron_bit.data.documents import document_starts
from megatron_bit.diffusion.noise import CONDITION, ESTIMATE, chosen
from megatron_bit.errors import UserError
from megatron_bit.model.chunk import TokenBatch, noise_tables
from megatron_bit.optim.build import build_optimizer
from megatron_bit.optim.schedule import learning_rate
from megatron_bit.parallel.logical import pieces
from megatron_bit.training.step import forward_backward

VOCAB_SIZE = 1999


def batch(config, size=3, first=2**32 - 1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB_SIZE, (size, config.data.seq_length), generator=generator)
    k, start = config.model.block_size, None
    if config.model.code == "raw":
        shape = (size, config.data.seq_length, -(-config.model.bits // 8))
        tokens = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if config.start_blocks is not None:
        tokens.clamp_(min=1)
        for row, ends in enumerate(([k - 1], [2 * k - 1, 3 * k - 1], [])):
            tokens[row, [end - (row == 1 and not config.data.align_blocks) for end in ends]] = 0
        start = torch.from_numpy(document_starts(tokens.numpy(), 0, k))
        assert start.unique(dim=0).shape[0] == 3
    return TokenBatch(tokens, torch.arange(first, first + size), start)  # crosses into the index's high word


def logical(model, groups, values):
    """Local tensors (by local name) as a dict by logical name."""
    return {
        part.name: part.of(values[name]).detach().clone()
        for name, parts in pieces(model, groups).items()
        for part in parts
    }


NOISY = ["model.head.kind=chain", "model.group_bits=4", "diffusion.noisy_every=2"]
SEEING = ["model.group_bits=4", "model.head.token_before=true", "model.head.soft_prior=true"]


@pytest.mark.parametrize("attention", ["causal", "block_causal"])
@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize(("block_size", "blocks"), [(1, 13), (3, 5), (4, 5)])
def test_loss_bound_and_every_gradient(groups, reference, make_config, make_model, block_size, blocks, loss, attention):
    config = make_config(block_size, blocks, f"diffusion.loss={loss}", f"model.attention={attention}")
    compare(groups, reference, make_model, config)


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize(
    "overrides",
    [
        ["model.group_bits=4"],  # groups of 4, 4 and 3 bits
        ["model.group_bits=6", "diffusion.loss=mse"],
        ["model.group_bits=4", "model.head.prior=false", "diffusion.parameterization=direct"],
        ["model.head.prior=false", "diffusion.parameterization=direct"],
        ["model.head.kind=chain", "model.head.window=1"],
        ["model.head.kind=chain", "model.head.window=4"],
        ["model.head.kind=chain", "model.group_bits=4"],
        ["model.head.kind=chain", "model.group_bits=4", "model.names=pairs"],
        ["model.head.kind=chain", "model.group_bits=6", "model.names=pairs", "model.head.prior_rank=7"],
        ["model.group_bits=4", "model.names=pairs"],
        ["model.group_bits=4", "model.head.token_before=true"],
        ["model.group_bits=6", "model.head.soft_prior=true", "diffusion.parameterization=direct"],
        [*SEEING, "model.names=pairs"],
        [*SEEING, "data.document_boundaries=mask", "data.align_blocks=true", "diffusion.self_condition=0.4"],
        ["model.group_bits=4", "diffusion.levels_apart=2", "diffusion.noise=logistic"],
        ["model.group_bits=6", "diffusion.levels_apart=1", "diffusion.loss=mse", "parallel.recompute=head"],
        [*SEEING, "diffusion.levels_apart=2", "diffusion.self_condition=0.4", "diffusion.parameterization=direct"],
        ["model.memory.rows=6"],
        ["model.group_bits=4", "model.memory.rows=6", "model.memory.orders=[1,3]", "model.memory.hashes=2"],
        ["model.head.kind=chain", "model.group_bits=4", "model.memory.rows=9"],
        ["model.head.kind=chain", "model.group_bits=6", "model.memory.rows=5", "model.memory.orders=[2,1,4]"],
        ["model.head.kind=chain", "model.group_bits=10", "model.memory.rows=9", "model.memory.hashes=2"],
        ["model.head.kind=chain", "model.group_bits=10", "model.head.prior=false"],
        NOISY,
        [*NOISY, "diffusion.noisy_every=1", "model.head.window=2", "parallel.recompute=head"],
        [*NOISY, "diffusion.noisy_every=7", "model.head.prior=false", "diffusion.noise=logistic"],
        [*NOISY, "model.names=pairs", "model.head.prior_rank=7", "model.memory.rows=9", "model.memory.orders=[1,3]"],
        [*NOISY, "model.memory.rows=5", "data.document_boundaries=mask", "data.align_blocks=true"],
        [*NOISY, "model.names=pairs", "diffusion.condition_drop=0.4", "diffusion.context_noise=0.2"],
        [*NOISY, "model.group_bits=1", "model.head.window=4"],
        ["model.head_dim=14"],
        ["model.head_dim=2", "model.qk_norm=false", "model.head.kind=chain"],
    ],
    ids=",".join,
)
def test_groups_and_chain(groups, reference, make_config, make_model, block_size, overrides):
    compare(groups, reference, make_model, make_config(block_size, 5, *overrides))


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("attention", ["causal", "block_causal"])
@pytest.mark.parametrize("boundaries", ["positions", "mask"])
@pytest.mark.parametrize("kind", ["diffusion", "chain"])
@pytest.mark.parametrize("rows", [0, 7])
def test_document_boundaries(groups, reference, make_config, make_model, rows, kind, boundaries, attention, block_size):
    config = make_config(
        block_size, 5, f"model.head.kind={kind}", "model.head.window=4", f"model.attention={attention}",
        f"data.document_boundaries={boundaries}", f"data.align_blocks={'true' if boundaries == 'mask' else 'false'}",
        f"model.memory.rows={rows}",
    )  # fmt: skip
    compare(groups, reference, make_model, config)


@pytest.mark.parametrize("rows", [0, 7])
@pytest.mark.parametrize("kind", ["diffusion", "chain"])
def test_context_noise(groups, reference, make_config, make_model, kind, rows):
    """In training alone, and of the backbone's input alone: targets and a chain's own input stay clean."""
    overrides = (f"model.head.kind={kind}", f"model.memory.rows={rows}", "diffusion.context_noise=0.4")
    config = make_config(3, 5, *overrides)
    compare(groups, reference, make_model, config)
    model, plain = make_model(config), make_model(make_config(3, 5, *overrides[:2]))
    data = batch(config)
    assert (model(data).loss - plain(data).loss).abs() > 1e-4
    assert torch.equal(model.eval()(data).metrics, plain.eval()(data).metrics)


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("kind", ["diffusion", "chain"])
def test_condition_drop(groups, reference, make_config, make_model, kind, block_size):
    """In training alone, of single blocks of single samples."""
    overrides = (f"model.head.kind={kind}", "model.group_bits=4", "diffusion.condition_drop=0.4")
    config = make_config(block_size, 5, *overrides)
    data = batch(config)
    dropped = chosen(config.train.seed, CONDITION, data.sample, 0, 5, 1, 0.4)[..., 0]
    assert 0 < dropped.sum() < dropped.numel() and len(dropped.unique(dim=0)) > 1 and len(dropped.unique(dim=1)) > 1
    compare(groups, reference, make_model, config)
    model, plain = make_model(config), make_model(make_config(block_size, 5, *overrides[:2]))
    assert (model(data).loss - plain(data).loss).abs() > 1e-4
    assert torch.equal(model.eval()(data).metrics, plain.eval()(data).metrics)


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("group_bits", [1, 4])
def test_self_condition(groups, reference, make_config, make_model, group_bits, block_size):
    """Shown to some evaluations in training, to all in validation; without it the estimate is not looked at."""
    overrides = (f"model.group_bits={group_bits}", "diffusion.condition_drop=0.3")
    config = make_config(block_size, 5, *overrides, "diffusion.self_condition=0.4")
    data = batch(config)
    shown = chosen(config.train.seed, ESTIMATE, data.sample, 0, 5, config.diffusion.noise_samples, 0.4)
    assert 0 < shown.sum() < shown.numel()
    assert all(len(shown.unique(dim=dim)) > 1 for dim in range(3))
    compare(groups, reference, make_model, config)

    model, plain = make_model(config), make_model(make_config(block_size, 5, *overrides))
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if n != "head.estimate.weight"})
    assert (model(data).loss - plain(data).loss).abs() > 1e-5
    assert (model.eval()(data).loss - plain.eval()(data).loss).abs() > 1e-5
    with torch.no_grad():
        model.head.estimate.weight.zero_()
    assert torch.equal(model.train()(data).loss, plain.train()(data).loss)
    assert torch.equal(model.eval()(data).metrics, plain.eval()(data).metrics)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.bits=11",),
        ("model.bits=70", "model.group_bits=7", "diffusion.self_condition=0.5"),
        ("model.bits=70", *SEEING, "model.names=pairs"),
        ("model.bits=256", "model.group_bits=8", "model.head.kind=chain"),
        (
            "model.bits=256",
            "model.group_bits=8",
            "model.head.kind=chain",
            "model.names=pairs",
            "model.head.prior_rank=5",
            "model.memory.rows=8",
        ),
    ],
)
def test_records(groups, reference, make_config, make_model, overrides):
    compare(groups, reference, make_model, make_config(3, 5, "model.code=raw", *overrides))


def test_a_record_is_its_bits(make_config, make_model):
    """The same model over ids and over records of the same bits."""
    ids, raw = make_config(3, 5, "model.bits=11"), make_config(3, 5, "model.bits=11", "model.code=raw")
    data = batch(ids)
    words = data.tokens << 5  # 11 bits at the front of 2 bytes
    records = torch.stack((words >> 8, words & 255), dim=-1).to(torch.uint8)
    assert torch.equal(make_model(ids)(data).loss, make_model(raw)(data._replace(tokens=records)).loss)


def test_self_condition_is_of_a_denoising_head_alone(make_config):
    with pytest.raises(UserError, match=r"^diffusion.self_condition 0.5 needs a head that denoises, and .* is chain"):
        make_config(3, 5, "model.head.kind=chain", "diffusion.self_condition=0.5")


def compare(groups, reference, make_model, config):
    model = make_model(config)
    other = reference.ReferenceModel(config, logical(model, groups, dict(model.named_parameters())))
    data = batch(config)

    out = model(data)
    out.loss.backward()
    expected_loss, expected_bound = other.loss(data.tokens, data.sample)
    expected_loss.backward()

    torch.testing.assert_close(out.metrics, torch.stack((expected_loss.detach(), expected_bound)), rtol=1e-5, atol=0)
    gradients = logical(model, groups, {n: p.grad for n, p in model.named_parameters()})
    assert gradients.keys() == other.weights.keys()
    for name, gradient in gradients.items():
        expected = other.weights[name].grad
        assert expected.norm() > 1e-7, f"{name} is invisible to the loss: the comparison is empty"
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize(
    "override",
    [
        "model.qk_norm=false",
        "model.code=gray",
        "model.num_kv_heads=6",
        "model.rope_base=77",
        "diffusion.noise=logistic",
    ],
)
def test_model_switches(groups, reference, make_config, make_model, override):
    config = make_config(3, 5, override)
    model = make_model(config)
    other = reference.ReferenceModel(config, logical(model, groups, dict(model.named_parameters())))
    data = batch(config)
    torch.testing.assert_close(
        model(data).metrics, torch.stack([v.detach() for v in other.loss(data.tokens, data.sample)]), rtol=1e-5, atol=0
    )


def test_hidden_states_and_noise(groups, reference, make_config, make_model):
    from megatron_bit.diffusion import noise

    config = make_config(3, 5)
    model = make_model(config)
    other = reference.ReferenceModel(config, logical(model, groups, dict(model.named_parameters())))
    data = batch(config)
    torch.testing.assert_close(
        model.hidden(data.tokens).transpose(0, 1), other.hidden(data.tokens), rtol=1e-5, atol=1e-5
    )

    log_sigma, eps = reference.draw_noise(config, data.sample, 5)
    seed, samples = config.train.seed, config.diffusion.noise_samples
    levels = model.noise.log_sigma(noise.stratified_levels(seed, noise.TRAIN, data.sample, 0, 5, samples))
    values = noise.gaussian(seed, noise.TRAIN, data.sample, 0, 5, samples, 3, config.model.bits)
    torch.testing.assert_close(levels.transpose(0, 1), log_sigma)
    torch.testing.assert_close(values.unflatten(0, (5, 3)).permute(2, 0, 3, 1, 4), eps)


def test_initial_values_follow_the_documented_rule(groups, reference, make_config, make_model):
    config = make_config(3, 5)
    model = make_model(config, perturb=False)
    ours = logical(model, groups, dict(model.named_parameters()))
    theirs = reference.initial_weights(config)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0, msg=name)
    other = reference.initial_weights(make_config(3, 5, "train.seed=78"))
    assert not torch.equal(other["embedding.start"], theirs["embedding.start"])


def test_reference_training_learns_and_ignores_the_cut_into_micro_batches(reference, make_config):
    config = make_config(3, 5, "optim.warmup_steps=2", "optim.lr=5e-3", "optim.grad_clip=0.3", "optim.head_lr_scale=2")
    tokens = torch.full((4, 15), 1234)
    weights = reference.initial_weights(config)
    whole = [[(tokens, torch.arange(4))] for _ in range(12)]
    halves = [[(tokens[i : i + 2], torch.arange(i, i + 2)) for i in (0, 2)] for _ in range(12)]
    losses, bounds, norms, final = reference.train_reference(config, weights, whole)
    assert losses[-1] < 0.8 * losses[0] and bounds[-1] < 0.8 * bounds[0]
    assert min(norms) < 0.3 < max(norms), "clipping never acted"
    cut = reference.train_reference(config, weights, halves)
    torch.testing.assert_close(torch.tensor(cut[:3]), torch.tensor((losses, bounds, norms)), rtol=1e-4, atol=0)
    assert all(torch.equal(weights[n], w) for n, w in reference.initial_weights(config).items())  # given ones are kept
    assert not torch.equal(final["head.output.weight"], weights["head.output.weight"])


@pytest.mark.parametrize(
    ("schedule", "stage", "noise", "more"),
    [
        ("cosine", 0, "lognormal", []),
        ("cosine", 1, "lognormal", []),
        ("wsd", 0, "lognormal", []),
        ("cosine", 1, "entropy_rate", []),
        (
            "wsd",
            0,
            "entropy_rate",
            [*SEEING, "diffusion.levels_apart=1", "optim.grad_clip=0.6"],
        ),  # which the table does not measure
    ],
)
def test_training_step_by_step(groups, reference, make_config, make_model, schedule, stage, noise, more):
    """Through torch and through DeepSpeed: losses, bounds, norms (AdamW hides a wrong scale, they do not), weights."""
    config = make_config(
        3,
        5,
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "train.steps=8",
        "optim.lr=5e-3",
        "optim.warmup_steps=2",
        "optim.head_lr_scale=2",
        "model.init_std=0.02",
        "optim.grad_clip=0.33",
        f"optim.schedule={schedule}",
        "optim.decay_fraction=0.5",
        f"diffusion.noise={noise}",
        "diffusion.noise_warmup=2",
        *more,
    )
    model = make_model(config)
    weights = logical(model, groups, dict(model.named_parameters()))
    groups = replace(groups, dims=replace(groups.dims, zero_stage=stage))
    optimizer = build_optimizer(config, [model], groups)
    steps = [[tuple(batch(config, 2, 4 * s + 2 * i, seed=2 * s + i)) for i in (0, 1)] for s in range(8)]
    measured = []
    for step, micro_batches in enumerate(steps):
        metrics = forward_backward([TokenBatch(*m) for m in micro_batches], optimizer, groups)
        loss, bound = metrics[:2].tolist()
        for table in noise_tables([model]):
            table.update(metrics[2:])
        optimizer.step([learning_rate(config, step) * group["lr_scale"] for group in optimizer.base.param_groups])
        measured.append((loss, bound, float(optimizer.grad_norm)))
    *expected, final = reference.train_reference(config, weights, steps)
    assert min(expected[2]) < config.optim.grad_clip < max(expected[2]), (
        "clipping has to act in some steps and not in others"
    )
    torch.testing.assert_close(torch.tensor(measured).T, torch.tensor(expected), rtol=1e-5, atol=0)
    tolerance = 1e-5 if noise == "lognormal" else 1e-4  # the levels depend on the weights, and AdamW magnifies rounding
    for name, value in logical(model, groups, dict(model.named_parameters())).items():
        torch.testing.assert_close(value, final[name], rtol=1e-4, atol=tolerance, msg=name)
