"""Float64 throughout, whatever a loss was written for, and every tensor back afterwards."""

import torch
from torch import nn
from torch.nn import functional as F

from mlo.double import in_double, in_float64


def test_a_loss_computes_in_float64_whatever_it_asks_for():
    outside, weight = torch.ones(5, 3), torch.ones(3, 3, dtype=torch.float64)

    def loss(levels, batch):
        x, index = batch
        assert x.dtype == torch.float64
        assert index.dtype == torch.int64
        mask = torch.zeros(5, 3)
        mask[0] = 1  # writes into the very tensor
        mask[1] += 2
        mask.mul_(3)
        assert mask[:2].tolist() == [[3.0] * 3, [6.0] * 3]
        hidden = F.linear(x.float() + outside, weight).half()
        assert hidden.dtype == (mask + outside).dtype == torch.ones(2, dtype=torch.float32).dtype == torch.float64
        assert outside.softmax(-1, dtype=torch.float32).dtype == outside.to(torch.float32).dtype == torch.float64
        assert torch.stack([x[0], outside[0]]).dtype == torch.float64
        assert outside.sort().values.dtype == torch.float64  # a tuple with names
        return (hidden * mask).sum() + F.mse_loss(hidden, outside)

    result = in_float64(loss)(None, (torch.ones(5, 3), torch.ones(5, dtype=torch.int64)))
    assert result.dtype == torch.float64
    assert outside.dtype == torch.float32


def test_modules_and_optimizers_get_their_very_tensors_back():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.LSTM(4, 2))
    net[0].bias.requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters())

    def step():
        net(torch.ones(5, 3))[0].sum().backward()
        optimizer.step()

    def tensors():
        states = [v for own in optimizer.state.values() for v in own.values()]
        found = [*net.parameters(), *net.buffers(), *states, *(p.grad for p in net.parameters() if p.grad is not None)]
        return [(t.data_ptr(), t.dtype, t.clone()) for t in found]

    step()
    before = tensors()
    with in_double([(net, optimizer)]):
        assert {t.dtype for t in [*net.parameters(), *net.buffers()]} == {torch.float64, torch.int64}
        in_float64(lambda levels, batch: net(batch)[0].sum())(None, torch.ones(5, 3)).backward()
        optimizer.step()
    for (pointer, dtype, value), (new_pointer, new_dtype, new_value) in zip(before, tensors(), strict=True):
        assert (pointer, dtype) == (new_pointer, new_dtype)
        assert torch.equal(value, new_value)
    step()
