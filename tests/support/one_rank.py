"""One rank that sends to itself: all collectives of a step by the backend of its device, beside torch.optim.ASGD.

With one rank the optimizer sends nothing. Here it is given process groups all the same, so that a machine with a single
GPU carries out reduce-scatters and all-gathers by NCCL. gloo does the same on a CPU, so that these cases run anywhere.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_asgd import ShardedASGD
from dist_asgd.comm.consensus import Agreement
from dist_asgd.comm.process_groups import SeparateGroups, SharedGroups

OPTIONS: dict[str, Any] = {"lr": 0.05, "t0": 3, "weight_decay": 0.01}
CASES: dict[str, dict[str, Any]] = {  # options of the optimizer; "stream": steps on a stream of their own
    "many buckets": {"bucket_bytes": 2**14},
    "one bucket": {},
    "gradients are reduced": {"gradients": "reduced", "bucket_bytes": 2**14},
    "gathers overlap with the next forward": {"module": True, "bucket_bytes": 2**14},
    "on a stream of its own": {"stream": True, "bucket_bytes": 2**14},
    "sent in bf16": {"wire_dtype": torch.bfloat16, "bucket_bytes": 2**14},
}
STEPS = 12


def join(device: torch.device) -> None:
    """Makes the default process group of this process alone, on its device, and has the optimizer use it."""
    backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=own)

    def groups_of_one(agreement: Agreement) -> SeparateGroups:
        shared = SharedGroups.of(dist.group.WORLD, "ShardedASGD()")
        return shared.take(dist.group.WORLD, [shared.free()])

    Agreement.separate_groups = groups_of_one  # type: ignore[method-assign]  # until this process ends


def trains_as_torch(device: torch.device, case: str) -> int:
    """Trains by collectives of one rank; each step must have the bits of torch.optim.ASGD.

    Returns:
        The number of buckets that had collectives.
    """
    join(device)
    options = dict(CASES[case])
    on_stream, wire = options.pop("stream", False), options.get("wire_dtype", torch.float32)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)), nn.Linear(64, 3)).to(device)
    masters = [nn.Parameter(param.detach().clone()) for param in model.parameters()]
    theirs = torch.optim.ASGD(masters, foreach=False, **OPTIONS)
    if options.get("module"):
        options["module"] = model
    ours = ShardedASGD(model.named_parameters(), **OPTIONS, **options)
    on_stream = on_stream and device.type == "cuda"
    with torch.cuda.stream(torch.cuda.Stream()) if on_stream else contextlib.nullcontext():
        for step in range(STEPS):
            grads = [torch.randn_like(param) for param in masters]
            torch.autograd.backward([(p * g).sum() for p, g in zip(model.parameters(), grads, strict=True)])
            ours.clip_grad_norm_(1e6)  # clips nothing, and reduces the norm
            ours.step()
            ours.zero_grad()
            model(torch.ones(2, 64, device=device))  # modules wait for what is still gathered
            ours.synchronize()
            for master, grad in zip(masters, grads, strict=True):
                master.grad = grad.to(wire).float()
            theirs.step()
            for (name, param), master in zip(model.named_parameters(), masters, strict=True):
                assert torch.equal(param, master.to(wire).float()), f"{case}: {name} in step {step}"
    state = ours.full_state_dict()["state"]
    with ours.averaged_parameters():
        for index, (param, master) in enumerate(zip(model.parameters(), masters, strict=True)):
            average = theirs.state[master]["ax"]
            assert torch.equal(state[index]["ax"], average.cpu()), f"{case}: average {index}"
            assert torch.equal(param, average), f"{case}: parameter {index} in averaged_parameters()"
    count = sum(bucket.collectives is not None for bucket in ours._all_buckets())
    dist.destroy_process_group()
    return count
