"""What stages exchange: packed by name, sized by the slots, whole or shared under sequence parallelism."""

import pytest
import torch

from megavar.parallel.payload import Payload, Slot

SLOTS = [Slot("condition", 3), Slot("hidden", 8, sharded=True), Slot("tap", 8, sharded=True)]


def tensors(payload_shares=1, batch=2, width=5):
    generator = torch.Generator().manual_seed(0)
    rows = {slot.name: slot.rows // payload_shares if slot.sharded else slot.rows for slot in SLOTS}
    return {name: torch.randn(count, batch, width, generator=generator) for name, count in rows.items()}


@pytest.mark.parametrize(("shares", "rows", "announced"), [(1, 19, 19), (2, 11, 22), (4, 7, 28)])
def test_every_tensor_comes_back_under_its_name(shares, rows, announced):
    payload, given = Payload(SLOTS, shares), tensors(shares)
    packed = payload.pack(dict(reversed(given.items())))  # the order of the slots decides, not the caller's
    assert packed.shape == (rows, 2, 5) and payload.rows == rows
    assert payload.length == announced, "the schedules divide what is announced by the tensor-parallel size"
    received = payload.unpack(packed)
    assert list(received) == ["condition", "hidden", "tap"]
    for name, value in given.items():
        assert torch.equal(received[name], value), name


def test_a_slot_that_is_not_filled_yet_is_zero_and_takes_no_gradient():
    payload, given = Payload(SLOTS), tensors()
    del given["tap"]
    given = {name: value.requires_grad_() for name, value in given.items()}
    received = payload.unpack(payload.pack(given))
    assert not received["tap"].any()
    (received["hidden"].sum() + received["tap"].sum()).backward()
    assert torch.equal(given["hidden"].grad, torch.ones_like(given["hidden"]))
    assert not given["condition"].grad.any()


def test_what_does_not_fit_names_the_slot():
    payload = Payload(SLOTS)
    with pytest.raises(AssertionError, match=r"no slot for \['tapped'\].*'condition', 'hidden', 'tap'"):
        payload.pack(tensors() | {"tapped": torch.zeros(8, 2, 5)})
    with pytest.raises(AssertionError, match="slot 'hidden' holds 8 rows, not 7"):
        payload.pack(tensors() | {"hidden": torch.zeros(7, 2, 5)})
    with pytest.raises(AssertionError, match="received 18 rows where these inputs make 19"):
        payload.unpack(torch.zeros(18, 2, 5))
    with pytest.raises(AssertionError, match="cannot be shared by 3 ranks"):
        Payload(SLOTS, 3)
    with pytest.raises(AssertionError, match="slots of the same name"):
        Payload([Slot("hidden", 1), Slot("hidden", 2)])
