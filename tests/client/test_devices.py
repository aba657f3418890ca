"""Devices and precisions that are not here are refused; seeds leave no trace."""

from __future__ import annotations

import pytest
import torch

from umbel.client.devices import autocast, choose, seeded
from umbel.core.errors import InputError
from umbel.core.run_file import Client


def test_auto_finds_a_device_that_computes():
    device = choose(Client())
    assert float(torch.ones(2, device=device).sum()) == 2.0
    assert choose(Client(device="cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:x", "cuda:99"])
def test_a_device_that_is_not_here_is_named(name):
    with pytest.raises(InputError, match=rf"device = '{name}'.*use"):
        choose(Client(device=name))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(InputError, match="'cuda' is not on this machine"):
        choose(Client(device="cuda"))


def test_float16_on_a_cpu_is_refused():
    with pytest.raises(InputError, match=r"float16.*needs a CUDA device.*bfloat16"):
        choose(Client(device="cpu", precision="float16"))


def test_half_precision_is_in_force_only_where_asked_for():
    weight = torch.ones(2, 2)
    cpu = torch.device("cpu")
    with autocast(cpu, Client(precision="bfloat16")):
        assert (weight @ weight).dtype is torch.bfloat16
    with autocast(cpu, Client()):
        assert (weight @ weight).dtype is torch.float32


def test_seeded_draws_repeat_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    draws = []
    for seed in (1, 1, 2):
        with seeded(torch.device("cpu"), seed):
            draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)
