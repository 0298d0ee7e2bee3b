"""Run by `torch.distributed.run` in two processes: three steps with the base in shares, and whole.

    sharded.py BASE ROWS VERSION QUANT_STORAGE ADAPTER_DTYPE

Prints one line of JSON: the losses of both, or the error that FSDP raises.
"""

import functools
import json
import os
import sys

import torch
import torch.distributed as dist

from qlora_edu.compat import quiet
from qlora_edu.finetuning import adapter_config
from qlora_edu.production.config import FinetuneConfig
from qlora_edu.production.loading import check_one_dtype, load_base
from qlora_edu.text.conversations import encode_conversations, read_conversations
from qlora_edu.training import collate, completion_loss


def main(base, rows, fsdp_version, storage, adapter_dtype):
    from peft import get_peft_model

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    config = FinetuneConfig.from_preset(
        "embedded", model=base, r=8, quant_storage=storage, adapter_dtype=adapter_dtype
    )

    def make():
        model, tokenizer = load_base(config)
        torch.manual_seed(0)
        with quiet():
            model = get_peft_model(model, adapter_config(config))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, adapter_dtype))
        return model, tokenizer

    def losses(model, batches):
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=3e-3)
        found = []
        for batch in batches:
            loss = completion_loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        return torch.stack(found)

    model, tokenizer = make()
    encoded = encode_conversations(tokenizer, read_conversations(rows), 64)
    whole = losses(model, [collate(encoded[8 * i : 8 * i + 8]) for i in range(3)])
    model, _ = make()
    report = {"whole": whole.tolist()}
    try:
        check_one_dtype(model)
        report["rule"] = "kept"
    except ValueError as error:
        report["rule"] = str(error)
    try:
        model = shard(model, fsdp_version)
        mine = [collate(encoded[8 * i + 4 * rank : 8 * i + 4 * rank + 4]) for i in range(3)]
        shared = losses(model, mine)
        dist.all_reduce(shared)
        report["shares"] = (shared / 2).tolist()
        report["held"] = sum(local(p).nbytes for p in model.parameters())
    except ValueError as error:
        report["error"] = str(error)
    if rank == 0:
        print(json.dumps(report), flush=True)
    dist.barrier()
    os._exit(0)  # gloo sometimes aborts while Python takes it down


def local(parameter):
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def shard(model, fsdp_version):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    if fsdp_version == "2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    policy = functools.partial(
        transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer}
    )
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
