"""
Two processes, each with half of every parameter (FSDP2) or all of them (DDP), beside the same model whole in each: the
same training?
"""

import copy
import json
import math
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_lstm import LSTMConfig, LSTMForCausalLM
from hf_lstm.model import cells_lstm

cells_lstm.FEW_PRODUCTS = math.inf  # the first layer projects each distinct token once, wherever it can
widths, lstm = [], torch.lstm
torch.lstm = lambda x, *arguments: (widths.append(x.shape[-1]), lstm(x, *arguments))[1]
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
result = {}
for name, options in {
    "stacked": {},
    "residual": {"block_type": "residual", "intermediate_size": 24},
    "hybrid": {
        "block_type": "residual",
        "layer_types": ["hf_lstm", "hf_lstm_window", "hf_lstm"],
        "attention_window": 6,
        "num_attention_heads": 2,
    },
    "chunked": {"loss_chunk_size": 5},
    "untied": {"tie_word_embeddings": False, "weight_dropout": 0.0},
    "in one group": {},
    "by DDP": {},
}.items():
    torch.manual_seed(0)
    config = LSTMConfig(vocab_size=40, hidden_size=16, num_hidden_layers=3, **options)
    sharded = LSTMForCausalLM(config).double().train()
    whole = copy.deepcopy(sharded)
    if name == "by DDP":  # which refuses a step in which a parameter has no part
        sharded = torch.nn.parallel.DistributedDataParallel(sharded)
    else:
        for layer in sharded.model.layers if name != "in one group" else ():
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (sharded, whole)]
    losses = {"sharded": [], "whole": []}
    for _ in range(4):
        ids = torch.randint(4, 40, (4, 16))
        widths.clear()
        loss = sharded(ids[2 * rank : 2 * rank + 2], labels=ids[2 * rank : 2 * rank + 2]).loss
        by_token = widths[0] == len(ids[2 * rank : 2 * rank + 2].unique())
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
    all_sharded = all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    differences, held = [], 0
    for parameter, expected in zip(sharded.parameters(), whole.parameters(), strict=True):
        full = parameter.full_tensor() if all_sharded else parameter
        differences.append((full - expected).abs().max().item())
        held += (parameter.to_local() if all_sharded else parameter).numel()
    result[name] = {
        "losses": losses,
        "difference": max(differences),
        "by_token": by_token,
        "all_sharded": all_sharded,
        "share": held / whole.num_parameters(),
    }
if rank == 0:
    print(json.dumps(result), flush=True)
dist.destroy_process_group()
os._exit(0)  # gloo's threads sometimes outlive the interpreter
