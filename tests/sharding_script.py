"""Two processes, each with half of every parameter (FSDP2), beside the same model whole in each: the same training?"""

import copy
import json
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_lstm import LSTMConfig, LSTMForCausalLM

dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
result = {}
for name, options in {
    "stacked": {},
    "residual": {"block_type": "residual", "intermediate_size": 24},
    "chunked": {"loss_chunk_size": 5},
    "untied": {"tie_word_embeddings": False, "weight_dropout": 0.0},
}.items():
    torch.manual_seed(0)
    config = LSTMConfig(vocab_size=40, hidden_size=16, num_hidden_layers=3, **options)
    sharded = LSTMForCausalLM(config).double().train()
    whole = copy.deepcopy(sharded)
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (sharded, whole)]
    losses = {"sharded": [], "whole": []}
    for _ in range(4):
        ids = torch.randint(4, 40, (4, 9))
        loss = sharded(ids[2 * rank : 2 * rank + 2], labels=ids[2 * rank : 2 * rank + 2]).loss
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses["sharded"].append(mean.item() / 2)
        loss = whole(ids, labels=ids).loss
        loss.backward()
        losses["whole"].append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    differences = [
        (parameter.full_tensor() - expected).abs().max().item()
        for parameter, expected in zip(sharded.parameters(), whole.parameters(), strict=True)
    ]
    result[name] = {
        "losses": losses,
        "difference": max(differences),
        "all_sharded": all(isinstance(parameter, DTensor) for parameter in sharded.parameters()),
        "share": sum(parameter.to_local().numel() for parameter in sharded.parameters()) / whole.num_parameters(),
    }
if rank == 0:
    print(json.dumps(result), flush=True)
dist.destroy_process_group()
os._exit(0)  # gloo's threads sometimes outlive the interpreter
