"""Placements, the tensors that stand for pieces, packing and blocks: parts that need no ranks."""

import copy
import io
import itertools
import multiprocessing.reduction
import pickle
import random

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from dist_asgd.asgd.rounding import Rounding
from dist_asgd.asgd.rule import asgd_step_
from dist_asgd.asgd.schedule import Hyperparameters, Scalars
from dist_asgd.buckets.packing import Packer
from dist_asgd.kernels.dispatch import BLOCK_PER_THREAD, block_size, update_blocks_
from dist_asgd.kernels.tensor_list import SliceStep
from dist_asgd.pieces import rank_local
from dist_asgd.sharding.layout import UNIT, plan_buckets
from dist_asgd.sharding.placement import Placement
from dist_asgd.sharding.sharded_state import ScalarCopy, StatePiece

BLOCK = BLOCK_PER_THREAD * torch.get_num_threads()

LAYOUTS = {
    "row-major": torch.randn(3, 4, 5),
    "transposed": torch.randn(4, 3).t(),
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
    "expanded": torch.randn(3, 1).expand(3, 4),
    "sliced": torch.randn(6, 8)[::2, 1:5],
    "0-d": torch.randn(()),
    "size 1": torch.randn(1, 5, 1).transpose(0, 2),
    "empty": torch.randn(0, 3),
}


@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS)
def test_a_placement_keeps_values_and_dense_strides(tensor):
    placement = Placement.of(tensor)
    flat = placement.flatten(tensor).clone()
    view = placement.view(flat)
    assert flat.ndim == 1 and torch.equal(view, tensor)
    assert view.stride() == torch.empty_like(tensor).stride()
    if torch.empty_like(tensor).stride() == tensor.stride():
        assert placement.flatten(tensor).data_ptr() == tensor.data_ptr(), "a dense tensor is flattened without a copy"


@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS)
def test_the_blocks_of_pieces_assemble_the_tensor(tensor):
    placement = Placement.of(tensor)
    flat = placement.flatten(tensor)
    for cut, other in itertools.combinations_with_replacement(range(0, len(flat) + 1, 1 + len(flat) // 7), 2):
        whole = torch.full(tensor.shape, torch.nan)
        for start, stop in ((0, cut), (cut, other), (other, len(flat))):
            piece = StatePiece(flat[start:stop], start, placement)
            chunks = piece.__create_chunk_list__()
            items = piece.__create_write_items__("name", piece)
            assert [item.tensor_data.chunk for item in items] == chunks
            for index, chunk in enumerate(chunks):
                block = piece.__get_tensor_shard__(MetadataIndex("name", chunk.offsets, index))
                assert block.shape == chunk.sizes
                where = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
                whole[where] = block
        assert torch.equal(whole, tensor)


def test_a_block_is_a_view_so_that_loading_fills_the_piece():
    piece = StatePiece(torch.zeros(6), 1, Placement.of(torch.empty(4, 2)))
    for chunk in piece.__create_chunk_list__():
        piece.__get_tensor_shard__(MetadataIndex("name", chunk.offsets)).fill_(1)
    assert piece.local.tolist() == [1.0] * 6


def test_a_state_piece_is_copied_and_saved_with_its_own_elements_only():
    piece = StatePiece(torch.arange(1000.0)[10:14], 2, Placement.of(torch.empty(4, 2)))
    buffer = io.BytesIO()
    torch.save(rank_local(piece), buffer)
    assert buffer.tell() < 3000
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for copied in (copy.deepcopy(piece), copy.copy(piece), piece.clone(), piece.cpu(), loaded):
        assert type(copied) is StatePiece and copied.shape == (4, 2)
        assert (copied.local.tolist(), copied.start) == ([10.0, 11.0, 12.0, 13.0], 2)
    assert piece.clone().local.data_ptr() != piece.local.data_ptr()


PICKLING = {
    "pickle": pickle.dumps,
    "torch.save": lambda state: torch.save(state, io.BytesIO()),
}


@pytest.mark.parametrize("dumps", PICKLING.values(), ids=PICKLING)
def test_a_part_of_a_tensor_is_pickled_only_as_rank_local_state(dumps):
    placement = Placement.of(torch.empty(4, 2))
    part, nothing, all_of_it = (StatePiece(torch.ones(n), 0, placement) for n in (4, 0, 8))
    empty = StatePiece(torch.empty(0), 0, Placement.of(torch.empty(0, 3)))
    dumps({"state": {0: {"ax": all_of_it}, 1: {"ax": empty}}})
    for piece in (part, nothing, part.clone(), copy.copy(part), copy.deepcopy(part)):
        state = {"state": {0: {"ax": piece}}, "param_groups": [{"params": [0], "lr": 0.1}]}
        with pytest.raises(pickle.PicklingError) as error:
            dumps(state)
        for remedy in ("full_state_dict()", "consolidate_state_dict(to=0)", "Checkpointer", "rank_local"):
            assert remedy in str(error.value)
        mine = rank_local(state)
        for known in (mine, copy.deepcopy(mine), {"optimizer": [mine]}, mine["state"][0]["ax"].clone()):
            dumps(known)
        assert mine["param_groups"] == state["param_groups"]
        assert mine["state"][0]["ax"].local is piece.local


def test_a_part_of_a_tensor_may_go_to_another_process_of_this_rank():
    """As DCP's async_save does, in its background process."""
    piece = StatePiece(torch.arange(4.0), 2, Placement.of(torch.empty(4, 2)))
    make, args = multiprocessing.reduction.ForkingPickler(io.BytesIO()).dispatch_table[StatePiece](piece)
    sent = make(*args)
    assert (sent.local.tolist(), sent.start, sent.rank_local) == ([0.0, 1.0, 2.0, 3.0], 2, False)


def test_borrowed_memory_is_copied_before_it_is_written_to():
    lent = torch.zeros(6)
    pieces = [StatePiece(lent, 1, Placement.of(torch.empty(4, 2))) for _ in range(3)]
    for piece in pieces:
        piece.borrowed = True
    pieces[0].copy_(StatePiece(torch.ones(6), 1, pieces[0].placement))
    for chunk in pieces[1].__create_chunk_list__():  # as DCP does to load
        pieces[1].__get_tensor_shard__(MetadataIndex("name", chunk.offsets)).fill_(1)
    alias = pieces[2].detach()
    alias.copy_(StatePiece(torch.ones(6), 1, alias.placement))
    assert not lent.any()
    assert [piece.local.tolist() for piece in pieces] == [[1.0] * 6] * 3
    saved = StatePiece(lent, 1, pieces[0].placement)
    saved.borrowed = True
    for item in saved.__create_write_items__("name", saved):
        assert saved.__get_tensor_shard__(item.index).untyped_storage().data_ptr() == lent.data_ptr(), "saved in place"


def test_operators_on_a_state_piece_say_what_to_use():
    with pytest.raises(NotImplementedError, match="full_state_dict"):
        StatePiece(torch.ones(2), 0, Placement.of(torch.empty(4))).sum()


def test_torchs_way_to_use_the_average_says_what_to_use():
    """p.copy_(optimizer.state[p]["ax"]), and the same between pieces of different ranks."""
    placement = Placement.of(torch.empty(4))
    first, second, longer = (StatePiece(torch.ones(n), start, placement) for n, start in ((2, 0), (2, 2), (3, 0)))
    with pytest.raises(NotImplementedError, match="averaged_parameters"):
        torch.zeros(4).copy_(first)
    for other in (second, longer, torch.ones(4)):
        with pytest.raises(NotImplementedError, match="averaged_parameters"):
            first.copy_(other)
    assert not torch.equal(first, second) and not torch.equal(first, longer)
    assert torch.equal(first.copy_(StatePiece(torch.zeros(2), 0, placement)).local, torch.zeros(2))


def test_packing_puts_every_gradient_at_its_place():
    chance = random.Random(0)
    for _ in range(200):
        params = [chance.choice(list(LAYOUTS.values())) for _ in range(chance.randint(1, 8))]
        (layout,) = plan_buckets([p.numel() for p in params], world_size=2, max_numel=10**6)
        params = [params[span.index] for span in layout.spans]
        placements = [Placement.of(p) for p in params]
        grads = [chance.choice([p, p.clone(), p.double(), None]) for p in params]
        out = torch.full((layout.numel,), torch.nan)
        if layout.numel:
            Packer(layout, placements, out).pack(range(len(params)), grads, 0, out)
        expected = torch.zeros(layout.numel)
        for span, placement, grad in zip(layout.spans, placements, grads, strict=True):
            if grad is not None:
                expected[span.start : span.stop] = placement.flatten(grad)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("numel", [1, 31, BLOCK - 1, BLOCK, BLOCK + 33, 2 * BLOCK + 1])
def test_walking_in_blocks_leaves_the_bits_alone(numel):
    h = Hyperparameters(lr=0.1, lambd=0.1, alpha=0.75, t0=0.0, weight_decay=0.1, maximize=True)
    scalars = Scalars(5, 0.037, (0.25, 0.5))
    grad, *own = torch.randn(4, numel)
    expected = [tensor.clone() for tensor in own]
    asgd_step_(expected[0], grad, expected[1:], h, scalars)
    update_blocks_(own[0], grad, SliceStep(own[1:], None, h, scalars, Rounding(torch.float32)))
    assert all(map(torch.equal, own, expected))


@pytest.mark.parametrize("numel", [0, 1, 33, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK // 2 + 1, 10 * BLOCK + 7])
def test_blocks_are_even_and_cut_at_whole_units(numel):
    size = block_size(numel, torch.device("cpu"))
    assert size % UNIT == 0 and size <= 2 * BLOCK
    blocks = [block.numel() for block in torch.empty(numel).split(size)]
    assert len(blocks) == 1 or blocks[-1] > BLOCK // 2, blocks
    assert block_size(numel, torch.device("cuda")) == max(numel, 1)


def test_a_scalar_that_another_rank_writes_is_a_plain_tensor_in_all_other_respects():
    scalar = ScalarCopy(torch.tensor(3.0))
    assert scalar.__create_write_items__("name", scalar) == []
    (chunk,) = scalar.__create_chunk_list__()
    assert chunk.offsets == torch.Size() and chunk.sizes == torch.Size()
    scalar.__get_tensor_shard__(MetadataIndex("name", torch.Size())).fill_(5)  # loads into it
    assert isinstance(scalar, torch.Tensor) and scalar.item() == 5 and scalar.shape == ()
    assert type(scalar + 1) is torch.Tensor and type(scalar.clone()) is torch.Tensor
    assert torch.equal(copy.deepcopy(scalar), scalar) and copy.deepcopy(scalar).data_ptr() != scalar.data_ptr()
    buffer = io.BytesIO()
    torch.save({"step": scalar}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer)["step"]
    assert type(loaded) is torch.Tensor and loaded.item() == 5
