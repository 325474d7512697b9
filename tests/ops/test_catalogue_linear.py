"""The failure catalogue for the linear ops: what N1-N40 say of logits, said of hidden states, weight and bias.

Where the logits are finite, `as_head` makes hidden states and a weight whose product they are to the bit, so that the
float64 reference and the tolerances are those of the other paths. Infinite logits come from the bias (whole columns)
or from products that overflow. Refused arguments are in tests/test_linear_errors.py, autograd and compile beside it.
"""

import math

import pytest
import torch

from fastgrpo import Objective, linear_grpo_loss, linear_token_logprob, policy_loss
from fastgrpo.ops.head_products import is_native
from fastgrpo.testing import assert_matches_reference, make_inputs
from tests.ops.common import (
    INF,
    LINEAR_PATHS,
    NAN,
    OBJECTIVES,
    PRESETS,
    assert_same_bits,
    bitwise_equal,
    reference_score,
    score,
)
from tests.ops.test_catalogue_batch import BAD_IDS, sides
from tests.ops.test_large_offsets import sparse_rows
from tests.ops.tolerance import assert_scored

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ALL_LIVE = torch.ones(3, 4, dtype=torch.bool)


# A vocabulary mask as a bias: 50 of 5000 columns kept (N1), or all before a column removed (N2).
@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("kept", ["50 columns", "from 4096 on"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_N1_N2_masked_vocabulary(path, kept, dtype):
    data = make_inputs(2, 3, 5000, dtype, seed=41)
    g = torch.Generator().manual_seed(42)
    columns = torch.arange(4096, 5000) if "from" in kept else torch.randperm(5000, generator=g)[:50]
    bias = torch.full((5000,), -INF, dtype=dtype).index_fill(0, columns, 0.0)
    ids = columns[torch.randint(len(columns), (2, 3), generator=g)]
    mask = torch.ones(2, 3, dtype=torch.bool)
    actual = score(path, data.logits, ids, data.advantage, mask, bias=bias)
    masked = data.logits + bias
    assert_scored(
        actual, reference_score(masked, ids, data.advantage, mask), masked, data.advantage
    )
    dropped = torch.ones(5000, dtype=torch.bool).index_fill(0, columns, False)
    assert bool((actual.dlogits[..., dropped] == 0).all()), "a removed column has a gradient"


def one_row_head(kind):
    """Hidden [3, 4, 2] and weight [9, 2] whose row (0, 1) is what `kind` says; the others are ordinary."""
    g = torch.Generator().manual_seed(43)
    hidden, weight = torch.zeros(3, 4, 2), torch.zeros(9, 2)
    hidden[..., 0] = torch.randn(3, 4, generator=g)
    weight[:, 0] = torch.randn(9, generator=g)
    if kind == "NaN":
        hidden[0, 1, 0] = NAN
    elif kind == "hidden inf":
        hidden[0, 1, 0] = INF
    else:  # finite numbers whose product overflows
        hidden[0, 1] = torch.tensor([0.0, 3e38])
        weight[:, 1] = -10.0 if kind == "all -inf" else 0.0
        weight[5, 1] = 10.0 if kind == "+inf" else weight[5, 1]
    return hidden, weight


def run_head(path, hidden, weight, ids, advantage, mask, **options):
    """(loss, per-token outputs and the hidden gradient, metrics)."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    if path == "linear_one_pass":
        out = linear_grpo_loss(hidden, weight, ids, advantage, mask, **options)
        logprob = out.logprob
    else:
        logprob = linear_token_logprob(hidden, weight, ids, mask=mask).logprob
        out = policy_loss(logprob, advantage, mask, **options)
    out.loss.backward()
    per_token = {"logprob": logprob.detach(), "token_loss": out.token_loss.detach()}
    return out.loss.detach(), per_token | {"dhidden": hidden.grad}, out.metrics


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("kind", ["NaN", "hidden inf", "all -inf", "+inf"])
def test_N3_N5_fault_stays_in_its_row(path, kind):
    data = make_inputs(3, 4, 9, seed=44)
    options = {"old_logprob": data.old_logprob, "objective": Objective.grpo(epsilon=0.9)}
    args = (data.token_ids, data.advantage)
    hidden, weight = one_row_head(kind)
    harmless = hidden.clone()
    harmless[0, 1] = 0.0
    _, clean, _ = run_head(path, harmless, weight, *args, ALL_LIVE, **options)
    loss, bad, metrics = run_head(path, hidden, weight, *args, ALL_LIVE, **options)
    assert bool(loss.isnan()), "a fault must be visible in the loss"
    assert float(metrics.sum("fault")) == 1
    others = ALL_LIVE.clone()
    others[0, 1] = False
    for name, value in bad.items():
        assert bool(value[0, 1].isnan().all()), name
        assert bitwise_equal(value[others], clean[name][others]), f"{name} of another row changed"
    # and the same row where it is masked: as if it were not there
    _, clean, _ = run_head(path, harmless, weight, *args, others, **options)
    loss, bad, metrics = run_head(path, hidden, weight, *args, others, **options)
    assert bool(loss.isfinite())
    assert float(metrics.sum("fault")) == 0
    assert all(bitwise_equal(value, clean[name]) for name, value in bad.items())


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_N4_forbidden_target(path, advantage):
    data = make_inputs(2, 3, 50, seed=45)
    mask = torch.ones(2, 3, dtype=torch.bool)
    ids = torch.tensor([[1, 7, 2], [3, 4, 5]])
    bias = torch.zeros(50).index_fill(0, torch.tensor([7]), -INF)
    out = score(path, data.logits, ids, torch.tensor([advantage, 1.0]), mask, bias=bias)
    assert float(out.logprob[0, 1]) == -INF
    assert bool(out.entropy.isfinite().all())
    assert bool(out.loss.isfinite())
    assert bool(out.dlogits.isfinite().all())
    assert bool((out.dlogits[0, 1] == 0).all())
    assert float(out.metrics.sum("fault")) == 1
    assert bool((out.dlogits[1] != 0).any()), "the other sequence still learns"


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize(
    ("dtype", "size", "temperature"),
    [(torch.float32, 1e37, 1e-2), (torch.bfloat16, 1e38, 0.5), (torch.float16, 6e4, 1e-2)],
    ids=str,
)
def test_N6_huge_logits_do_not_overflow(path, dtype, size, temperature):
    logits = torch.full((1, 3, 40), size).to(dtype)
    logits[0, 0, 1:] = -size
    logits[0, 1, ::2] *= 0.5
    ids = torch.tensor([[0, 1, 7]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    out = score(path, logits, ids, torch.ones(1), mask, temperature=temperature)
    want = torch.tensor([[0.0, math.log(1 / 20), math.log(1 / 40)]], dtype=torch.float64)
    assert_matches_reference(out.logprob, want, atol=1e-6)
    assert_matches_reference(out.entropy, -want, atol=4e-6)
    assert bool(out.dlogits.isfinite().all())


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 31, 255, 256, 257, 4097, 50_257])
def test_N7_N8_dtype_and_vocabulary(path, dtype, vocabulary):
    data = make_inputs(3, 1, vocabulary, dtype, seed=vocabulary)
    args = (data.logits, data.token_ids, data.advantage, torch.ones(3, 1, dtype=torch.bool))
    actual = score(path, *args, old_logprob=data.old_logprob)
    expected = reference_score(*args, old_logprob=data.old_logprob)
    assert_scored(actual, expected, data.logits, data.advantage)
    assert actual.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert actual.dlogits.dtype == dtype


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo", "luspo", "vespo"])
@pytest.mark.parametrize(
    "shape", [(0, 4), (3, 0), (0, 0), (3, 4)], ids=["B=0", "T=0", "B=T=0", "masked"]
)
def test_N9_N10_nothing_to_learn_from(path, name, shape):
    hidden, weight = torch.randn(*shape, 5, requires_grad=True), torch.randn(11, 5).requires_grad_()
    mask = torch.zeros(shape, dtype=torch.bool)
    ids, old = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    options = {"old_logprob": old, "objective": OBJECTIVES[name]}
    loss, out, metrics = run_head(
        path, hidden.detach(), weight.detach(), ids, torch.ones(shape[0]), mask, **options
    )
    assert float(loss) == 0.0
    assert out["dhidden"].shape == hidden.shape
    assert bool((out["dhidden"] == 0).all())
    assert all(float(value) == 0.0 for value in metrics.values())


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_N11_masked_garbage_is_bitwise_irrelevant(path, name):
    """NaN, infinities and impossible ids in masked slots of every per-token argument; hidden rows are NaN there too."""
    data = make_inputs(4, 6, 37, seed=46)
    dead = ~data.mask
    clean = sides(data)
    options = {"objective": OBJECTIVES[name]}
    args = (data.logits, data.token_ids, data.advantage, data.mask)
    expected = score(path, *args, **clean, **options)
    assert bool((expected.dlogits != 0).any())
    for garbage, bad_id in ((NAN, -100), (INF, 2**40), (3e38, 37)):
        poisoned = {
            key: value.masked_fill(dead, garbage) if isinstance(value, torch.Tensor) else value
            for key, value in clean.items()
        }
        advantage = data.advantage[:, None].expand(4, 6).masked_fill(dead, garbage)
        ids = data.token_ids.masked_fill(dead, bad_id)
        actual = score(path, data.logits, ids, advantage, data.mask, **poisoned, **options)
        assert_same_bits(actual, expected, f"with {garbage} in masked slots")


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("bad_id", BAD_IDS)
def test_N12_bad_id_on_a_live_token(path, bad_id):
    data = make_inputs(2, 3, 37, seed=47)
    mask = torch.ones(2, 3, dtype=torch.bool)
    hidden, weight = torch.randn(2, 3, 5), torch.randn(37, 5)
    ids = data.token_ids.clone()
    ids[1, 2] = bad_id
    _, clean, _ = run_head(path, hidden, weight, data.token_ids, data.advantage, mask)
    loss, bad, metrics = run_head(path, hidden, weight, ids, data.advantage, mask)
    assert bool(loss.isnan())
    assert float(metrics.sum("fault")) == 1
    others = mask.clone()
    others[1, 2] = False
    for name, value in bad.items():
        assert bool(value[1, 2].isnan().all()), name
        assert bitwise_equal(value[others], clean[name][others]), name


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("log_ratio", [1e2, -1e2, 1e4, INF, -INF])
@pytest.mark.parametrize("name", PRESETS)
def test_N16_extreme_log_ratio(path, log_ratio, name):
    data = make_inputs(3, 2, 11, seed=48)
    mask = torch.ones(3, 2, dtype=torch.bool)
    advantage = torch.tensor([1.0, -1.0, 0.0])
    own = score(path, data.logits, data.token_ids, advantage, mask).logprob
    old = own.clone()
    old[:, 0] -= log_ratio
    options = {"old_logprob": old, "ref_logprob": own, "objective": PRESETS[name]}
    out = score(path, data.logits, data.token_ids, advantage, mask, **options)
    assert float(out.metrics.sum("clamp_log_ratio")) == 3
    assert float(out.metrics.sum("fault")) == (3 if math.isinf(log_ratio) else 0)
    if name == "dro" and math.isinf(log_ratio):
        assert not bool(out.loss.isfinite())
        return
    assert bool(out.loss.isfinite())
    assert bool(out.dlogits.isfinite().all())
    if PRESETS[name].kl.beta == 0:
        assert bool((out.dlogits[2] == 0).all()), "an advantage of 0 has exactly no gradient"


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("delta", [100.0, -100.0, INF, -INF])
def test_N17_extreme_kl(path, delta):
    data = make_inputs(2, 3, 11, seed=49)
    mask = torch.ones(2, 3, dtype=torch.bool)
    own = score(path, data.logits, data.token_ids, data.advantage, mask).logprob
    options = {"ref_logprob": own + delta, "objective": Objective.grpo(beta=0.04)}
    out = score(path, data.logits, data.token_ids, data.advantage, mask, **options)
    assert bool(out.loss.isfinite())
    assert bool(out.dlogits.isfinite().all())
    assert float(out.metrics.sum("clamp_kl")) == 6


@pytest.mark.parametrize("path", LINEAR_PATHS)
def test_N19_beta_zero_never_lets_the_reference_in(path):
    data = make_inputs(3, 4, 19, seed=50)
    args = (path, data.logits, data.token_ids, data.advantage, data.mask)
    without = score(*args, old_logprob=data.old_logprob)
    for ref in (data.ref_logprob, torch.full((3, 4), NAN), torch.full((3, 4), INF)):
        given = score(*args, old_logprob=data.old_logprob, ref_logprob=ref)
        for name in ("loss", "token_loss", "dlogits"):
            assert bitwise_equal(given.tensors()[name], without.tensors()[name])


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("name", ["grpo", "gspo", "luspo", "cispo", "ppo"])
def test_N21_no_old_policy_means_ratio_exactly_one(path, name):
    data = make_inputs(3, 5, 19, seed=51)
    args = (path, data.logits, data.token_ids, data.advantage, data.mask)
    out = score(*args, objective=PRESETS[name])
    assert float(out.metrics.min("ratio")) == float(out.metrics.max("ratio")) == 1.0


# 32,768 log-ratios around 2e-6 in one sequence: more rows than a chunk holds, so it is scored first and recomputed.
def test_N23_long_sequence_mean():
    length = 32_768
    g = torch.Generator().manual_seed(52)
    hidden, weight = torch.randn(1, length, 2, generator=g), torch.randn(5, 2, generator=g)
    ids = torch.randint(5, (1, length), generator=g)
    mask = torch.ones(1, length, dtype=torch.bool)
    own = linear_token_logprob(hidden, weight, ids).logprob
    old = own - (torch.randn(1, length, generator=g) * 1e-6 + 2e-6)
    exact = (own.double() - old.double()).mean().exp()
    options = {"old_logprob": old, "objective": Objective.gspo(), "workspace_bytes": 1 << 16}
    out = linear_grpo_loss(hidden, weight.requires_grad_(), ids, torch.ones(1), mask, **options)
    assert float(out.metrics.max("ratio")) == pytest.approx(float(exact), abs=1.2e-7)
    out.loss.backward()
    assert bool(weight.grad.isfinite().all())


@pytest.mark.parametrize("path", LINEAR_PATHS)
def test_N28_advantage_per_sequence_equals_per_token(path):
    data = make_inputs(3, 4, 19, seed=53)
    args = (path, data.logits, data.token_ids)
    expected = score(*args, data.advantage, data.mask, **sides(data))
    per_token = data.advantage[:, None].expand(3, 4)
    assert_same_bits(score(*args, per_token, data.mask, **sides(data)), expected)


def test_N29_entropy_extremes():
    """One token certain by 80 nats, and the uniform distribution over a real vocabulary."""
    vocabulary = 151_936
    weight = torch.zeros(vocabulary, 1)
    weight[77] = 80.0
    hidden = torch.tensor([[1.0], [0.0]])
    out = linear_token_logprob(hidden, weight, torch.tensor([77, 5]), with_entropy=True)
    tail = (vocabulary - 1) * math.exp(-80)
    assert float(out.entropy[0]) == pytest.approx(80 * tail, rel=2e-2)
    assert float(out.logprob[0]) == pytest.approx(-tail, rel=1e-4)
    assert float(out.entropy[1]) == pytest.approx(math.log(vocabulary), abs=4e-6)


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_N35_repeated_runs(path, name):
    data = make_inputs(4, 6, 37, seed=54)
    args = (path, data.logits, data.token_ids, data.advantage, data.mask)
    first = score(*args, **sides(data), objective=OBJECTIVES[name])
    for _ in range(2):
        assert_same_bits(score(*args, **sides(data), objective=OBJECTIVES[name]), first)


@pytest.mark.parametrize("factor", [0.0, -2.0, 1024.0, 1e-3, NAN, INF])
@pytest.mark.parametrize("path", LINEAR_PATHS)
def test_N40_scaled_upstream(path, factor):
    data = make_inputs(3, 4, 19, seed=55)
    plain = score(path, data.logits, data.token_ids, data.advantage, ALL_LIVE).dlogits
    hidden = torch.eye(12).view(3, 4, 12)
    weight = data.logits.view(12, 19).t().contiguous().requires_grad_()
    if path == "linear_one_pass":
        loss = linear_grpo_loss(hidden, weight, data.token_ids, data.advantage, ALL_LIVE).loss
    else:
        logprob = linear_token_logprob(hidden, weight, data.token_ids).logprob
        loss = policy_loss(logprob, data.advantage, ALL_LIVE).loss
    (factor * loss).backward()
    found = weight.grad.t().reshape(3, 4, 19)
    if not math.isfinite(factor):
        assert not bool(found.isfinite().all()), "a bad upstream gradient must be visible"
        return
    scale = float(plain.abs().max()) * abs(factor)
    assert_matches_reference(found, plain.double() * factor, atol=2**-23 * scale, rtol=2**-22)


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "hessian"])
def test_N31_functional_transforms_are_right_or_raise(path, transform):
    data = make_inputs(2, 3, 7, torch.float64, seed=56)
    mask = torch.ones(2, 3, dtype=torch.bool)
    hidden = torch.randn(2, 3, 5, dtype=torch.float64)

    def function(weight):
        if path == "linear_one_pass":
            return linear_grpo_loss(hidden, weight, data.token_ids, data.advantage, mask).loss
        return linear_token_logprob(hidden, weight, data.token_ids).logprob.sum()

    def plain(weight):
        x = torch.log_softmax(hidden @ weight.t(), -1)
        logprob = x.gather(-1, data.token_ids[..., None])[..., 0]
        if path == "linear_one_pass":
            ratio = (logprob - logprob.detach()).exp()
            return -(ratio * data.advantage.double()[:, None]).mean()
        return logprob.sum()

    weight = torch.randn(7, 5, dtype=torch.float64)
    call = {
        "grad": lambda f: torch.func.grad(f)(weight),
        "jvp": lambda f: torch.func.jvp(f, (weight,), (torch.ones_like(weight),))[1],
        "vmap": lambda f: torch.func.vmap(f)(torch.stack([weight, weight * 2])),
        "hessian": lambda f: torch.func.hessian(f)(weight),
    }[transform]
    expected = call(plain)
    try:
        actual = call(function)
    except (RuntimeError, NotImplementedError):
        return
    assert_matches_reference(actual, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_N13_hidden_rows_and_weight_rows_far_apart(tmp_path, dtype):
    rows = sparse_rows(tmp_path / "rows", dtype)[:, :64]
    other = torch.randn(40, 64, generator=torch.Generator().manual_seed(57)).to(dtype)
    ids = torch.tensor([3, 20, 39])
    far = linear_token_logprob(rows, other, ids, with_entropy=True)
    near = linear_token_logprob(rows.clone(), other, ids, with_entropy=True)
    assert bitwise_equal(far.logprob, near.logprob)
    assert bitwise_equal(far.entropy, near.entropy)
    far = linear_token_logprob(other, rows, torch.arange(40) % 3)  # as the head of 3 tokens
    near = linear_token_logprob(other, rows.clone(), torch.arange(40) % 3)
    assert bitwise_equal(far.logprob, near.logprob)


def test_N39_a_sharded_head_is_gathered_and_its_gradient_scattered(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight, hidden = torch.randn(7, 5), torch.randn(3, 5)
        ids = torch.tensor([0, 6, 3])
        bias = torch.randn(7)
        plain = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
        sharded = [distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in plain]
        for head, shift in (sharded, plain):
            linear_token_logprob(hidden, head, ids, bias=shift).logprob.sum().backward()
        for x, y in zip(sharded, plain, strict=True):
            assert bitwise_equal(x.grad.full_tensor(), y.grad)
        with pytest.raises(TypeError, match="hidden must be a plain tensor, got a DTensor"):
            linear_token_logprob(distribute_tensor(hidden, mesh, [Shard(0)]), plain[0], ids)
    finally:
        dist.destroy_process_group()


def test_N39_tensors_without_data_are_refused():
    hidden, weight = torch.zeros(2, 3, 5, device="meta"), torch.zeros(7, 5, device="meta")
    with pytest.raises(ValueError, match=r"hidden must hold data .*on meta"):
        linear_token_logprob(hidden, weight, torch.zeros(2, 3, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("ids", [[0], [63], [64], [255], [0, 63, 64, 127, 128, 255]], ids=str)
@pytest.mark.parametrize("mode", ["mixed", "auto"])
def test_a_tokens_own_column_is_exact_in_every_slab_of_the_weight(monkeypatch, ids, mode):
    """What rounding takes from the largest entry of a row of dlogits is added back, also at the edges of slabs."""
    from fastgrpo.functional.linear import inputs, weight_sum

    if mode == "auto" and not is_native(torch.device("cpu")):
        pytest.skip("auto rounds the logits on this CPU, or on this backend")
    if mode == "mixed":  # what a GPU runs
        monkeypatch.setattr(inputs, "choose_mode", lambda *_: "mixed")
        monkeypatch.setattr(inputs, "is_native", lambda _: False)
    g = torch.Generator().manual_seed(58)
    hidden = torch.randn(96, 32, generator=g).bfloat16()
    weight = (torch.randn(256, 32, generator=g) / 8).bfloat16()
    ids = torch.tensor(ids).repeat(96)[:96]
    upstream = torch.rand(96, generator=g) + 0.5
    wide = weight.double().requires_grad_()
    exact = torch.log_softmax(hidden.double() @ wide.t(), -1).gather(1, ids[:, None])[:, 0]
    (exact * upstream.double()).sum().backward()
    found = []
    for slab_bytes in (1 << 30, 128 * 32 * 4, 64 * 32 * 4):  # the weight in one piece, two, four
        monkeypatch.setattr(weight_sum, "SLAB_BYTES", slab_bytes)
        leaf = weight.clone().requires_grad_()
        out = linear_token_logprob(hidden, leaf, ids, workspace_bytes=1 << 14)  # several chunks
        (out.logprob * upstream).sum().backward()
        rows = ids.unique()
        error = (leaf.grad[rows].double() - wide.grad[rows]).norm()
        floor = (wide.grad[rows].bfloat16().double() - wide.grad[rows]).norm()
        found.append(float(error / floor))
    assert max(found) <= 1.1, found


def test_N40_float64_gradients_are_scaled_in_float64():
    data = make_inputs(3, 4, 19, torch.float64, seed=59)
    found = []
    for factor in (1.0, 1 / 3):
        hidden = torch.eye(12, dtype=torch.float64).view(3, 4, 12)
        weight = data.logits.view(12, 19).t().contiguous().requires_grad_()
        loss = linear_grpo_loss(hidden, weight, data.token_ids, data.advantage, ALL_LIVE).loss
        (factor * loss).backward()
        found.append(weight.grad)
    assert_matches_reference(found[1], found[0] / 3, atol=1e-17, rtol=1e-15)
