"""Checkpoints of sharded state: whole tensors in the files of several ranks, read by any number of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from fastgrpo.trainer.checkpoint import weights
from fastgrpo.trainer.checkpoint.contents import contents, model_files, position, restore
from fastgrpo.trainer.checkpoint.store import Checkpoint, Store
from fastgrpo.trainer.checkpoint.tree import StateError
from fastgrpo.trainer.parallel import distributed
from fastgrpo.trainer.parallel.distributed import Ranks
from fastgrpo.trainer.state import State
from fastgrpo.trainer.train import grpo
from tests.trainer_faults.runs import SMALL, make_run, wait
from tests.trainer_faults.test_ranks import fork_ranks, logs

JOB = replace(SMALL, max_steps=2, sampling_streams=2, parallel="fsdp2")


def by_ranks(action, count: int, log: Path) -> None:
    """Runs `action(ranks)` in processes that meet."""

    def one() -> int:
        ranks = distributed.start("fsdp2", dead_after=30)
        action(ranks)
        ranks.stop()
        return 0

    assert [wait(pid) for pid in fork_ranks(one, count, log)] == [0] * count, logs(log)


def save(state: State, folder: Path) -> Path:
    ranks = state.run.ranks
    store = Store(folder, 0, ranks.rank, ranks.world_size)
    extra = model_files(state.run) if ranks.is_main else []
    return store.save(position(state), contents(state, {}, extra), ranks.share)


def trained(ranks: Ranks) -> State:
    run = make_run(JOB)
    run.ranks = ranks
    state = State(run)
    for _ in grpo(run, state):
        pass
    return state


def restored(ranks: Ranks, path: Path) -> State:
    run = make_run(JOB)
    run.ranks = ranks
    for parameter in run.policy.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    state = State(run)
    restore(state, Checkpoint(path), print)
    return state


def tensors_of(path: Path, part: str) -> dict[str, torch.Tensor]:
    files = sorted(path.glob(f"{part}*.safetensors"))
    loaded = [load_file(file) for file in files]
    names = [name for content in loaded for name in content]
    assert len(names) == len(set(names)), "a tensor is in two files"
    return {name: tensor for content in loaded for name, tensor in content.items()}


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> Path:
    """A checkpoint of two FSDP2 ranks, in small files."""
    folder = tmp_path_factory.mktemp("shards")
    patch = pytest.MonkeyPatch()
    patch.setattr(weights, "FILE_BYTES", 4096)

    def action(ranks: Ranks) -> None:
        state = trained(ranks)
        patch.setattr(
            DTensor, "full_tensor", lambda _: pytest.fail("a rank asked for all of a tensor")
        )
        mine = contents(state, {}, [])
        held = [sum(len(piece) for piece in content) for _, content in mine]
        (folder / f"held-{ranks.rank}").write_text(json.dumps(sum(held)))
        save(state, folder)

    by_ranks(action, 2, folder / "log")
    patch.undo()
    return folder / "step-2"


def test_every_tensor_is_in_one_file_and_files_are_as_large_as_one_another(by_two):
    for part in ("model", "reference", "optimizer"):
        sizes = [path.stat().st_size for path in by_two.glob(f"{part}-*.safetensors")]
        assert len(sizes) >= 4
        assert len(sizes) % 2 == 0
        tensors = tensors_of(by_two, part)
        largest = max(tensor.nbytes for tensor in tensors.values())
        header = 200 * len(tensors)
        assert max(sizes) - min(sizes) <= largest + header
    held = [json.loads((by_two.parent / f"held-{rank}").read_text()) for rank in (0, 1)]
    assert max(held) < 0.75 * sum(held), "a rank had more than its part"


def test_transformers_reads_it_as_it_is(by_two):
    model = AutoModelForCausalLM.from_pretrained(by_two, dtype=torch.float32)
    stored = tensors_of(by_two, "model")
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in stored.items())
    ids = torch.tensor([[1, 2, 3]])
    policy = restored(Ranks(), by_two).run.policy.model
    assert torch.equal(model.eval()(ids).logits, policy(ids).logits)


def test_from_two_ranks_to_one_and_back_is_exact(by_two, tmp_path, monkeypatch):
    """Weights, reference and moments: the bits of the first checkpoint are those of the third."""
    state = restored(Ranks(), by_two)
    one = save(state, tmp_path / "one")
    for part in ("model", "reference", "optimizer"):
        before, after = tensors_of(by_two, part), tensors_of(one, part)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), part
    monkeypatch.setattr(weights, "FILE_BYTES", 4096)
    by_ranks(lambda ranks: save(restored(ranks, one), tmp_path / "two"), 2, tmp_path / "log")
    files = [Checkpoint(path).manifest["files"] for path in (by_two, tmp_path / "two" / "step-2")]
    shared = [n for n in files[0] if n.startswith(("model", "reference", "optimizer"))]
    assert len(shared) > 12
    assert all(files[0][name] == files[1][name] for name in shared)


def test_three_ranks_read_what_two_wrote(by_two, tmp_path):
    def action(ranks: Ranks) -> None:
        run = make_run(replace(JOB, sampling_streams=3))
        run.ranks = ranks
        state = State(run)
        stored = weights.StoredTensors(by_two)
        stored.read_module(run.policy.model)
        expected = tensors_of(by_two, "model")
        for name, tensor in run.policy.model.state_dict().items():
            if name in expected:
                assert torch.equal(distributed.full(tensor), expected[name]), name
        assert state.step == 0

    by_ranks(action, 3, tmp_path / "log")


SHAPES = [
    (1,),
    (2,),
    (3, 2),
    (5,),
    (4, 1),
    (7, 3, 2),
]  # fewer rows than ranks, and shares of unequal size


def test_sharded_tensors_of_any_number_of_rows_reach_one_rank(tmp_path):
    def action(ranks: Ranks) -> None:
        mesh = init_device_mesh("cpu", (3,))
        for number, shape in enumerate(SHAPES):
            for dtype in (torch.float32, torch.bfloat16):
                whole = torch.arange(float(torch.Size(shape).numel())).view(shape).to(dtype)
                sharded = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
                owner = number % 3
                found = weights.at_rank(sharded, owner, ranks.rank)
                if ranks.rank == owner:
                    assert found is not None
                    assert torch.equal(found, whole)
                else:
                    assert found is None
        with pytest.raises(StateError, match="laid out as"):
            weights.at_rank(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]), 0, ranks.rank)
        dist.barrier()

    by_ranks(action, 3, tmp_path / "log")


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("limit", [1, 1000, 1 << 30])
def test_tensors_are_dealt_out_evenly(monkeypatch, world_size, limit):
    monkeypatch.setattr(weights, "FILE_BYTES", limit)
    tensors = {f"t{n}": torch.empty(n * n % 37, dtype=torch.uint8) for n in range(50)}
    files = weights.deal(tensors, world_size)
    assert sorted(name for names in files for name in names) == sorted(tensors)
    assert all(files)
    sizes = [sum(tensors[name].nbytes for name in names) for names in files]
    assert max(sizes) - min(sizes) <= 37
    assert len(files) == 1 or len(files) % world_size == 0 or len(files) == len(tensors)
    assert weights.deal({}, world_size) == [[]]


def test_what_is_missing_or_of_another_shape_is_named(by_two, tmp_path):
    stored = weights.StoredTensors(by_two)
    model = make_run(JOB).policy.model
    with pytest.raises(weights.Unusable, match=r"critic\.model\.embed_tokens\.weight is missing"):
        stored.read_module(model, "critic.")
    model.model.norm.weight = torch.nn.Parameter(torch.ones(8))
    with pytest.raises(weights.Unusable, match=r"norm.weight has shape \(16,\), expected \(8,\)"):
        stored.read_module(model)
